"""One HTML file that replays a recording: the views' script and style, and the recording itself in base64."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

from inference_workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from inference_workbench.recording import Recording

_STATIC = Path(__file__).parent / "static"
_LINE = 4096
"""Characters of base64 a line: editors and version control choke on one line of megabytes."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
html, body {{ margin: 0; min-height: 100%; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0e1013; }} }}
{style}
</style>
</head>
<body>
<noscript>This page replays a recording of an inference server with a script that it carries: allow scripts.</noscript>
<script type="text/plain" id="inference-workbench-recording">
{data}
</script>
<script>
{script}
</script>
</body>
</html>
"""


def write_html(recording: Recording, path: Path) -> Path:
    """Write the page and return its path.

    The page loads nothing: its own security policy forbids it to. It is a third larger than the recording, plus about
    1.3 MB for the views.

    Raises
    ------
    WorkbenchError
        If the views' script is not built.
    """
    script, style = (_STATIC / name for name in ("replay.js", "widget.css"))
    for part in (script, style):
        if not part.exists():
            raise WorkbenchError(
                f"The views' JavaScript is not built: {part} is missing. In a checkout: cd extension && jlpm build."
            )
    data = base64.b64encode(recording.bytes()).decode("ascii")
    page = _PAGE.format(
        title=html.escape(f"{recording.manifest.name} · Inference Workbench"),
        style=style.read_text(encoding="utf-8").replace("</", "<\\/"),
        data="\n".join(data[at : at + _LINE] for at in range(0, len(data), _LINE)),
        # In a string of the script, the end of a script element would end ours.
        script=script.read_text(encoding="utf-8").replace("</script", "<\\/script").replace("<!--", "<\\!--"),
    )
    path.write_text(page, encoding="utf-8")
    return path
