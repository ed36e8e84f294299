"""A small engine process that speaks the real protocol over real sockets and misbehaves on demand.

Stands where the real engine would, for faults that the real one does not have. Run by the front with the arguments of
:func:`main` before ``--config``, ``--receive`` and ``--send``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from inference_server import features
from inference_server.lifetime import die_with_parent
from inference_server.protocol import (
    EXIT_LOAD_FAILED,
    PROTOCOL_VERSION,
    Cancel,
    Capacity,
    EngineConfig,
    FeaturesApplied,
    FromEngine,
    Heartbeat,
    Hello,
    KvEvents,
    KvOp,
    KvUsage,
    LoadFailed,
    LoadProgress,
    ModelInfo,
    Notice,
    Ping,
    Pong,
    Ready,
    RequestCancelled,
    RequestFailed,
    SampledTokens,
    SetFeatures,
    Shutdown,
    StepEvent,
    StepReport,
    Submit,
    ToEngine,
)


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--behaviour", default="good")
    parser.add_argument("--after", type=int, default=3, help="steps until a fault")
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--clock-ahead-s", type=float, default=0.0)
    parser.add_argument(
        "--once", type=Path, help="a file: where it exists, behave well; where not, make it and misbehave"
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--receive", required=True)
    parser.add_argument("--send", required=True)
    options = parser.parse_args()
    if options.once:
        if options.once.exists():
            options.behaviour = "good"
        else:
            options.once.touch()
    if options.behaviour == "traceback":
        raise ImportError("libmissing.so: cannot open shared object file")
    ScriptedEngine(options).run()


class ScriptedEngine:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = msgspec.json.decode(options.config, type=EngineConfig)
        self.context = zmq.Context()
        self.commands, self.reports = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        self.commands.setsockopt(zmq.RCVHWM, 0)
        self.reports.setsockopt(zmq.SNDHWM, 0)
        self.commands.connect(options.receive)
        self.reports.connect(options.send)
        self.lock = threading.Lock()
        self.active: dict[int, tuple[Submit, int]] = {}
        self.steps = self.epoch = 0
        self.features = features.Features()
        self.silent = False

    def now(self) -> int:
        return time.monotonic_ns() + int(self.options.clock_ahead_s * 1e9)

    def say(self, message: FromEngine) -> None:
        if not self.silent:
            with self.lock:
                self.reports.send(msgspec.msgpack.encode(message))

    def beat(self) -> None:
        while True:
            self.say(Heartbeat(self.now(), self.steps, 1))
            time.sleep(0.2)

    def run(self) -> None:
        self.say(Hello(pid=os.getpid(), protocol=PROTOCOL_VERSION, versions={}))
        threading.Thread(target=self.beat, daemon=True).start()
        self.say(LoadProgress("pretending", 0.5))
        time.sleep(self.options.load_s)
        if self.options.behaviour == "load-fails":
            self.say(LoadFailed("The weights are not weights.", "Choose a model."))
            self.silent = True
            with self.lock:
                self.reports.close()
                self.commands.close()
                self.context.term()  # what was said has left this process
            sys.exit(EXIT_LOAD_FAILED)
        if self.options.behaviour == "dies-loading":
            os.kill(os.getpid(), signal.SIGSEGV)
        self.say(self.ready())
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while True:
            while self.commands.poll(0 if self.active else 50):
                self.obey(decoder.decode(self.commands.recv()))
            if self.active:
                self.step()

    def obey(self, command: ToEngine) -> None:
        match command:
            case Submit():
                if command.sampling.presence_penalty:
                    for handle in command.requests:
                        self.say(RequestFailed(handle, "presence_penalty is not implemented", "invalid"))
                    return
                self.active |= dict.fromkeys(command.requests, (command, 0))
            case Cancel(handle):
                print("cancelled", handle, flush=True)
                if self.active.pop(handle, None):
                    self.say(RequestCancelled(handle))
            case SetFeatures(correlation, values):
                self.features = features.apply(self.features, values, features.specs_by_name())
                self.epoch += 1
                self.say(
                    FeaturesApplied(
                        correlation=correlation,
                        epoch=self.epoch,
                        values=self.features.as_dict(),
                        changed=list(values),
                        cost="free",
                        apply_ns=1,
                        applied_at_ns=self.now(),
                        preempted=0,
                        recompute_tokens=0,
                    )
                )
            case Ping(sent_ns):
                self.say(Pong(sent_ns, self.now()))
            case Shutdown():
                if self.options.behaviour != "will-not-end":
                    sys.exit(0)
            case _:
                raise AssertionError(command)

    def step(self) -> None:
        begin = self.now()
        time.sleep(self.options.step_s)
        if self.steps >= self.options.after:
            self.misbehave()
        handles = list(self.active)
        tokens = SampledTokens(request=[], index=[], token_id=[], logprob=[], top=[], finish=[])
        started = []
        for handle in handles:
            submit, done = self.active[handle]
            if not done:
                started.append(handle)
            last = done + 1 == submit.sampling.max_tokens
            tokens.request.append(handle)
            tokens.index.append(done)
            tokens.token_id.append(submit.prompt[done % len(submit.prompt)])  # says the prompt again and again
            tokens.logprob.append(-0.5)
            tokens.top.append(None)
            tokens.finish.append("length" if last else None)
            self.active[handle] = (submit, done + 1)
            if last:
                del self.active[handle]
        step = StepEvent(
            step=self.steps,
            epoch=self.epoch,
            begin_ns=begin,
            schedule_ns=1,
            prepare_ns=1,
            forward_ns=1,
            sample_ns=1,
            update_ns=1,
            end_ns=self.now(),
            path="scripted",
            request=handles,
            start=[0] * len(handles),
            scheduled=[1] * len(handles),
            kind=[1] * len(handles),
            running=len(handles),
            waiting=0,
            kv=KvUsage(total_blocks=10, used_blocks=1, cached_blocks=0, filled_slots=1, block_size=16),
        )
        self.steps += 1
        self.say(
            StepReport(
                step=step,
                tokens=tokens,
                started=started,
                cached=[0] * len(started),
                begin_ns=begin,
                kv_events=self.one_block_a_step(handles[0]),
            )
        )

    def one_block_a_step(self, handle: int) -> KvEvents:
        """Each step takes a block and gives back that of the step before."""
        block = step = self.steps - 1
        if step == 0:
            op, blocks, request = [KvOp.RESET, KvOp.ALLOCATE], [10, 0], [-1, handle]
        else:
            op, blocks, request = [KvOp.FREE, KvOp.ALLOCATE], [(block - 1) % 10, block % 10], [self.holder, handle]
        self.holder = handle
        return KvEvents(step=step, op=[int(each) for each in op], block=blocks, request=request)

    def misbehave(self) -> None:
        match self.options.behaviour:
            case "dies":
                print("RuntimeError: the device fell off the bus", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case "exits":
                print("RuntimeError: the device fell off the bus", file=sys.stderr, flush=True)
                sys.exit(3)
            case "goes-silent":
                self.silent = True
            case "has-something-to-say" if self.steps == self.options.after:
                self.say(Notice("error", "a block leaked"))
            case "babbles":
                with self.lock:
                    self.reports.send(b"\x93not a message")

    def ready(self) -> Ready:
        return Ready(
            model=ModelInfo(
                name="scripted",
                source="scripted",
                architecture="none",
                path=self.options.tokenizer,
                num_parameters=0,
                num_layers=1,
                num_kv_heads=1,
                head_dim=1,
                vocab_size=384,
                max_model_len=100_000,
                dtype="float32",
                device="cpu",
                device_name="none",
                weight_bytes=0,
                eos_token_ids=(2,),
            ),
            capacity=Capacity(
                block_size=16,
                num_blocks=10,
                kv_bytes=1,
                kv_bytes_per_token=1,
                max_num_seqs=256,
                max_model_len=100_000,
            ),
            features=self.features.as_dict(),
            specs=features.SPECS,
            epoch=self.epoch,
            load_ns=1,
        )


if __name__ == "__main__":
    main()
