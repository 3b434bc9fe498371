"""A clip base for other programs: whole, and on request with the code that runs it.

    python -m studio.bases.sticker_video.standalone BASE --to package|portable --out DIR

`package`   a plain pipeline folder with every weight in it; whoever has the studio installed opens it with
            `StickerVideoPipeline.from_pretrained`, without trusting code that comes along.
`portable`  the same with the source of the network and of the pipeline beside it, as two files that need nothing but
            diffusers; opened with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from studio import errors
from studio.bases.folder import INDEX
from studio.bases.sticker_video.family import StickerVideo
from studio.bases.sticker_video.sharing import save_clip_base
from studio.errors import RequestError, StudioError, nearest
from studio.exporting.destination import REPORT_NAME, move_into_place, refuse_existing, workshop
from studio.files import write_atomically

FORMS = ("package", "portable")
HERE = "studio.bases.sticker_video"
UNET_FILE, PIPELINE_FILE = "sticker_unet", "pipeline"
#: Which modules become which file, in the order in which they need each other.
BUNDLES = {
    f"unet/{UNET_FILE}.py": ("layers", "network"),
    f"{PIPELINE_FILE}.py": ("alpha", "conditioning", "detail", "pipeline"),
}

README = """---
license: {licence}
library_name: diffusers
tags: [text-to-video, image-to-video, stickers]
---
# {name}

Moving stickers of {frames} frames, {side} x {side} pixels, with transparency. {how}

```python
{program}
frames = pipe("a fox bouncing", num_frames=8, fps=8, loop=True).frames[0]      # pictures with transparency
frames = pipe("a fox bouncing", frames={{0: picture}}, num_frames=8).frames[0]   # from a picture; also several
```
"""
PROGRAMS = {
    "package": "from studio.bases.sticker_video.pipeline import StickerVideoPipeline\n\n"
    'pipe = StickerVideoPipeline.from_pretrained("{name}")',
    "portable": "from diffusers import DiffusionPipeline\n\n"
    'pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)',
}
HOW = {
    "package": "The studio that it was made with opens it.",
    "portable": "It brings its own code, `pipeline.py` and `unet/sticker_unet.py`, which diffusers runs only if told "
    "to trust it: read them first.",
}


def export_base(base: StickerVideo, to: str, out: Path, force: bool = False) -> Path:
    """Writes the base as a folder. Raises RequestError before anything is written, DiskError."""
    if to not in FORMS:
        raise RequestError(f"unknown form '{to}' of a base", nearest(to, FORMS))
    if to == "portable" and not getattr(base.denoiser, "masks_frames", False):
        raise RequestError(f"'{base.name}' has a network of diffusers' own", "export it as a package")
    out = out.expanduser().absolute()
    refuse_existing(out, force)
    with workshop(out) as room:
        folder = room / "export"
        save_clip_base(base, folder, share=False)
        if to == "portable":
            _bring_code(folder)
        write_atomically(folder / "README.md", _readme(base, to, out.name))
        write_atomically(
            folder / REPORT_NAME, json.dumps({"format": to, "base": Path(base.name).name}, indent=1) + "\n"
        )
        move_into_place(folder, out)
    return out


def _readme(base: StickerVideo, to: str, name: str) -> str:
    program = PROGRAMS[to].format(name=name)
    facts = {"licence": base.licence or "apache-2.0", "name": name, "frames": f"1 to {base.max_frames}"}
    return README.format(**facts, side=base.resolution, how=HOW[to], program=program)


def _bring_code(folder: Path) -> None:
    """Adds the source, and an index that points to it."""
    for file, modules in BUNDLES.items():
        write_atomically(folder / file, bundle([import_module(f"{HERE}.{module}") for module in modules]))
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["_class_name"] = [PIPELINE_FILE, "StickerVideoPipeline"]
    index["unet"] = [UNET_FILE, "StickerUNet"]
    write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def bundle(modules: Sequence[ModuleType]) -> str:
    """The modules as one that imports nothing of the studio: their docstrings, their imports, then their code.

    What they import from each other stands above; of `studio.errors` the two classes that they raise are brought.
    """
    texts, imports, bodies = [], {"from __future__ import annotations"}, []
    for module in modules:
        source = inspect.getsource(module)
        tree = ast.parse(source)
        lines = source.splitlines()
        texts.append(ast.get_docstring(tree, clean=False) or "")
        for node in tree.body:
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not (getattr(node, "module", None) or "").startswith("studio"):
                    imports.add(ast.unparse(node))
                lines[start:end] = [""] * (end - start)
        first = tree.body[0].end_lineno or 0
        bodies.append("\n".join(lines[first:]).strip())
    if any("RequestError" in body for body in bodies):
        bodies.insert(0, "\n\n".join(inspect.getsource(cls) for cls in (errors.StudioError, errors.RequestError)))
    future, others = "from __future__ import annotations", sorted(imports)
    others.remove(future)
    head = '"""' + "\n\n".join(text.strip() for text in texts) + '\n"""'
    return "\n\n".join([head, future, "\n".join(others), *(f"\n{body}" for body in bodies)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a base. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {HERE}.standalone", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", metavar="BASE", help="pipeline folder, or the name of a bundled base")
    parser.add_argument("--to", default="package", help="package or portable (default package)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    options = parser.parse_args(arguments)
    from studio.bases.registry import load_base
    from studio.terminal import print_error, say

    try:
        base = load_base(options.base, dtype="fp32")
        if not isinstance(base, StickerVideo):
            raise RequestError(f"'{options.base}' draws no moving stickers", "give a base of the family sticker_video")
        say(f"written to {export_base(base, options.to, options.out, options.force)}")
    except StudioError as error:
        print_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
