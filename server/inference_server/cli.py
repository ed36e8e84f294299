"""The command line: ``inference-workbench serve | lab | status | record | export | bench …``; ``--help`` lists all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from inference_server import discovery, launch
from inference_server.discovery import ServerFile
from inference_server.version import distribution_version

app = typer.Typer(
    name="inference-workbench",
    help="Watch, switch and measure language-model inference, live.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        _out.print(distribution_version())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Watch, switch and measure language-model inference, live."""


@app.command()
def serve(
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="TCP port on 127.0.0.1; 0 takes any free one. [default: 8765, or a free]"),
    ] = None,
    uds: Annotated[Path | None, typer.Option(help="Listen on a Unix socket at this path instead of TCP.")] = None,
    model: Annotated[
        str | None, typer.Option(help="'default', a hub id, a folder with safetensors weights, or a .gguf file.")
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    token: Annotated[
        str | None,
        typer.Option(help="The token that clients must send. Other users see a command line: prefer the environment."),
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory for the KV cache, such as 512M or 4G. [default: by what is free]")
    ] = None,
    packed_memory: Annotated[
        str | None,
        typer.Option(help="Memory for packed copies of the weights (int8, int4). [default: by what is free]"),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest context, in tokens.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="A smaller model with the same vocabulary that can propose tokens, as --model.")
    ] = None,
    eagle_head: Annotated[
        str | None, typer.Option(help="Folder of an EAGLE-3 head for the model, in the format of speculators.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Let pages of this origin use the server. May be repeated.")
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(help="Who starts the server: cli, jupyter or kernel. The last two end it when they end."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve a model on this machine, to whoever has the token.

    Every option can be given as an environment variable too: INFERENCE_WORKBENCH_TOKEN, INFERENCE_WORKBENCH_MODEL …
    """
    if port is not None and uds is not None:
        raise typer.BadParameter("Choose one of --port and --uds.")
    given: dict[str, Any] = {
        "port": port,
        "uds": str(uds) if uds is not None else None,
        "model": model,
        "served_name": served_name,
        "device": device,
        "dtype": dtype,
        "token": token,
        "kv_memory": parse_bytes(kv_memory) if kv_memory is not None else None,
        "packed_memory": parse_bytes(packed_memory) if packed_memory is not None else None,
        "max_model_len": max_model_len,
        "threads": threads,
        "draft_model": draft_model,
        "eagle_head": eagle_head,
        "allowed_origins": tuple(allow_origin) if allow_origin else None,
        "origin": origin,
        "log_level": log_level,
    }
    # The web stack is imported here, so that the other commands stay quick.
    try:
        from inference_server.front.serve import ServeError, run  # noqa: PLC0415
        from inference_server.front.settings import SettingsError, settings_from  # noqa: PLC0415
    except ModuleNotFoundError as error:
        _err.print(
            f"[red]The server needs the package {error.name!r}, which is not installed.[/red] "
            'Install it with: pip install "inference-workbench\\[server]"'
        )
        raise typer.Exit(1) from error
    try:
        run(settings_from({name: value for name, value in given.items() if value is not None}))
    except (ServeError, SettingsError) as error:
        _err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:  # Ctrl-C is how a person stops it: no news
        raise typer.Exit(130) from None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(
    context: typer.Context,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Insist on this port. [default: 8888, or the next free one]")
    ] = None,
) -> None:
    """Fetch the model if necessary and open JupyterLab with the first lesson and the live views.

    Further options go to JupyterLab, for example --no-browser.
    """
    try:
        if os.environ.get("INFERENCE_WORKBENCH_MODEL", "default") == "default":
            launch.fetch_default_model(_out)
        launch.open_jupyterlab(_out, port, context.args)
    except launch.LaunchError as error:
        _err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error


@app.command()
def fetch_model() -> None:
    """Download and convert the default model, so that the first start does not have to."""
    try:
        _out.print(str(launch.fetch_default_model(_out)))
    except launch.LaunchError as error:
        _err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error


@app.command()
def distill(
    folder: Annotated[Path, typer.Argument(help="Keeps everything; the same folder goes on with what was cut off.")],
    model: Annotated[str, typer.Option(help="The teacher, as for serve.")] = "default",
    kind: Annotated[str, typer.Option(help="head, or student: a model of its own with fewer layers.")] = "head",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    tokens: Annotated[int, typer.Option(min=1000, help="How much text the teacher writes.")] = 200_000,
    epochs: Annotated[int, typer.Option(min=1, help="How often it is trained on.")] = 6,
    draft_vocab: Annotated[int, typer.Option(min=16, help="How many tokens the head can propose.")] = 6144,
    layers: Annotated[int, typer.Option(min=0, help="Of a student. [default: half of the teacher's]")] = 0,
    seed: Annotated[int, typer.Option(help="Of the texts and their order.")] = 1,
) -> None:
    """Train what proposes tokens for a model, or a smaller model like it, on text that the model writes itself."""
    if kind not in {"head", "student"}:
        raise typer.BadParameter(f"--kind is head or student, not {kind!r}.")
    command = [sys.executable, "-m", "inference_server.distill", "--model", model, "--folder", str(folder)]
    command += ["--device", device, "--tokens", str(tokens), "--epochs", str(epochs)]
    command += ["--draft-vocab", str(draft_vocab), "--seed", str(seed), "--kind", kind, "--layers", str(layers)]
    # Ctrl-C reaches the training too, which finishes its step and writes a checkpoint: wait for that.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        training = subprocess.Popen(command, preexec_fn=_listen_to_interrupts)  # noqa: PLW1509, S603 - no threads yet
        status_ = training.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if status_:
        raise typer.Exit(status_)


def _listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@app.command()
def status() -> None:
    """List the servers of this user that are running."""
    servers = discovery.list_servers()
    if not servers:
        _out.print("No server is running. Start one with: inference-workbench serve")
        raise typer.Exit(1)
    for server in servers:
        where = f"the Unix socket {server.uds}" if server.uds else f"{server.url}/?token={server.token}"
        up = _duration(time.time() - server.started)
        _out.print(where, markup=False)  # a line of its own and whole, to be copied
        _out.print(
            f"    engine {_engine_state(server)}, pid {server.pid}, up {up}, version {server.version}, "
            f"started by {server.origin}",
            markup=False,
        )


@app.command()
def record(
    seconds: Annotated[float | None, typer.Option(min=0, help="End after so long. [default: at Ctrl-C]")] = None,
    name: Annotated[str, typer.Option(help="Name of the recording.")] = "",
    note: Annotated[str, typer.Option(help="What to remember about it.")] = "",
    pid: Annotated[int | None, typer.Option(help="Process id of the server; may be left out if there is one.")] = None,
) -> None:
    """Record what a running server does, into a file that opens without it."""
    from inference_server.remote_recording import RemoteRecordingError  # noqa: PLC0415 -- only this command needs it
    from inference_server.remote_recording import record as record_server  # noqa: PLC0415

    server = _chosen_server(pid)
    try:
        path = record_server(server, _err, name=name, note=note, seconds=seconds)
    except RemoteRecordingError as error:
        _err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    _out.print(path, markup=False)


@app.command()
def recover(
    journal: Annotated[Path, typer.Argument(help="An .iwjournal file that a server left behind.")],
) -> None:
    """Turn the journal of a recording that was cut off into a recording."""
    from inference_server.recording.convert import finish  # noqa: PLC0415 -- only this command needs it
    from inference_server.recording.file import RecordingFile  # noqa: PLC0415
    from inference_server.recording.format import RecordingError  # noqa: PLC0415

    try:
        with _out.status("Making the recording …"):
            path = finish(journal)
        with RecordingFile(path) as file:
            manifest = file.manifest
    except RecordingError as error:
        _err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    _out.print(str(path), markup=False)
    cut = f", {manifest.torn_bytes} bytes at its end were no whole record" if manifest.torn_bytes else ""
    _out.print(f"    {manifest.tables['tokens'].rows:,} tokens of {manifest.tables['steps'].rows:,} steps{cut}")


@app.command()
def export(
    recording: Annotated[Path, typer.Argument(help="An .iwrec file, or the .iwjournal of one that still runs.")],
    html: Annotated[bool, typer.Option("--html", help="One HTML file that replays it, without a network.")] = False,
    chrome_trace: Annotated[
        bool, typer.Option("--chrome-trace", help="A trace for ui.perfetto.dev or chrome://tracing.")
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="A folder with one CSV file per table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to. [default: beside the recording, under its name]")
    ] = None,
) -> None:
    """Turn a recording into something that other programs open."""
    from inference_server.recording.format import RecordingError  # noqa: PLC0415 -- only this command needs it
    from inference_workbench import WorkbenchError, open_recording  # noqa: PLC0415

    wanted = [name for name, asked in (("html", html), ("chrome-trace", chrome_trace), ("csv", csv)) if asked]
    if not wanted:
        raise typer.BadParameter("Choose one or more of --html, --chrome-trace and --csv.")
    if output is not None and len(wanted) > 1:
        raise typer.BadParameter("Give --output for one format at a time.")
    suffixes = {"html": ".html", "chrome-trace": ".trace.json", "csv": ".csv"}
    try:
        with open_recording(recording) as opened:
            writers = {"html": opened.to_html, "chrome-trace": opened.to_chrome_trace, "csv": opened.to_csv}
            for name in wanted:
                path = writers[name](output or recording.with_suffix(suffixes[name]))
                files = path.iterdir() if path.is_dir() else (path,)
                size = sum(file.stat().st_size for file in files)
                _out.print(f"{path}  ({size / 1e6:,.1f} MB)", markup=False)
    except (RecordingError, WorkbenchError, OSError) as error:
        _err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error


@app.command()
def bench(
    url: Annotated[
        str | None, typer.Option(help="Address of any server of OpenAI's API. [default: the server that runs here]")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="INFERENCE_WORKBENCH_BENCH_TOKEN", help="Its key; prefer the environment.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for. [default: the first that it lists]")] = None,
    workload: Annotated[
        str, typer.Option(help="A preset, such as chat; or a file: .json, .jsonl (also ShareGPT), .iwrec.")
    ] = "chat",
    requests: Annotated[int | None, typer.Option(min=1, help="How many. [default: the workload's, or 24]")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="A closed loop of so many.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Or arrivals by themselves: so many a second.")] = None,
    burstiness: Annotated[float | None, typer.Option(help="1 is a Poisson process, below 1 are bursts.")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="Length of prompts: 128, or 100:600.")] = None,
    output_tokens: Annotated[str | None, typer.Option(help="Length of answers: 128, or 16:128.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers are exactly as long as drawn.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts, lengths and arrivals.")] = None,
    vllm: Annotated[str | None, typer.Option(help="Instead, the options of 'vllm bench serve', in quotes.")] = None,
    guidellm: Annotated[str | None, typer.Option(help="Instead, those of 'guidellm benchmark', in quotes.")] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Send token ids instead of words (our server, vLLM).")
    ] = False,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests that go first and do not count.")] = 1,
    slo: Annotated[str | None, typer.Option(help="Objectives for goodput, in ms: ttft=500,tpot=50.")] = None,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="Search the highest rate at which 90 % of requests meet --slo.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here, as JSON.")] = None,
    details: Annotated[bool, typer.Option("--details", help="With every request's times.")] = False,
    json_only: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a server as a client sees it: ours, vLLM, llama.cpp, Ollama, or any other of OpenAI's API."""
    from inference_server.workloads.workload import WorkloadError  # noqa: PLC0415 -- only this command needs them
    from inference_workbench.bench_command import BenchOptions, run_bench  # noqa: PLC0415
    from inference_workbench.errors import WorkbenchError  # noqa: PLC0415

    chosen = None if url is not None else _chosen_server(None)
    given = {
        "concurrency": concurrency,
        "rate": rate,
        "burstiness": burstiness,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "ignore_eos": ignore_eos or None,
        "temperature": temperature,
        "seed": seed,
    }
    options = BenchOptions(
        server=chosen,
        url=url,
        token=token,
        model=model,
        workload=workload,
        values={name: value for name, value in given.items() if value is not None},
        vllm=vllm,
        guidellm=guidellm,
        requests=requests,
        as_text=not token_ids,
        warm_up=warm_up,
        slo=slo,
        find_capacity=find_capacity,
        output=output,
        details=details,
        json_only=json_only,
    )
    try:
        run_bench(options, _out, _err)
    except (WorkbenchError, WorkloadError) as error:
        _err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error


@app.command()
def stop(
    pid: Annotated[
        int | None, typer.Argument(help="Process id of the server; may be left out if there is one.")
    ] = None,
) -> None:
    """Stop a running server and free its memory."""
    server = _chosen_server(pid)
    os.kill(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while any(each.pid == server.pid for each in discovery.list_servers()):
        if time.monotonic() > deadline:
            _err.print(f"The server (pid {server.pid}) is still there. End it with: kill -9 {server.pid}")
            raise typer.Exit(1)
        time.sleep(0.1)
    _out.print(f"The server (pid {server.pid}) has stopped.")


def _chosen_server(pid: int | None) -> ServerFile:
    """Return the running server that is meant, or end with the reason why that is not clear."""
    servers = discovery.list_servers()
    chosen = [server for server in servers if pid is None or server.pid == pid]
    if not chosen:
        _err.print("No server is running." if pid is None else f"No server of this user has the process id {pid}.")
        raise typer.Exit(1)
    if len(chosen) > 1:
        _err.print(f"Several servers are running: name one of {', '.join(str(server.pid) for server in chosen)}.")
        raise typer.Exit(1)
    return chosen[0]


def parse_bytes(text: str) -> int:
    """Return a number of bytes from text such as ``"512M"`` or ``"4GiB"`` (powers of 1024).

    Raises
    ------
    typer.BadParameter
        If it is not one.
    """
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    unit = units.get(number[-1:], 1)
    try:
        value = int(float(number[:-1] if unit > 1 else number) * unit)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise typer.BadParameter(f"{text!r} is not an amount of memory. Write for example 512M or 4G.")
    return value


def _duration(seconds: float) -> str:
    hours, rest = divmod(max(0, int(seconds)), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _engine_state(server: ServerFile) -> str:
    import httpx  # noqa: PLC0415 -- only this command needs it

    transport = httpx.HTTPTransport(uds=server.uds) if server.uds else None
    try:
        with httpx.Client(transport=transport, timeout=2, trust_env=False) as client:
            return str(client.get(f"{server.url or 'http://localhost'}/health").json()["engine"])
    except (httpx.HTTPError, ValueError, KeyError):
        return "does not answer"


if __name__ == "__main__":
    main()
