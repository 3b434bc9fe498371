"""One click for those who have nothing yet: the studio's own examples, taught to the bundled base."""

from __future__ import annotations

import time
from pathlib import Path

from studio import jobs, library
from studio.files import slug, write_atomically
from studio.paths import assets_dir, studio_home
from ui import settings

CONCEPTS = ("mascot", "riso")


def folders() -> list[Path]:
    """Folders of pictures that come with the studio."""
    return [assets_dir() / "examples" / name for name in CONCEPTS if (assets_dir() / "examples" / name).is_dir()]


def teach(folder: Path, preset: str = "subject") -> Path:
    """Queues a training on an example, and returns its run's folder."""
    name = library.free_name(folder.name)
    taken = {Path(job.run).name for job in jobs.jobs()}
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    run = library.runs_dir() / next(n for n in (stamp, *(f"{stamp}-{i}" for i in range(2, 1000))) if n not in taken)
    content = settings.presets()[preset]
    content = {**content, "data": {**content["data"], "path": str(folder)}}
    order = studio_home() / "orders" / f"{slug(run.name)}.yaml"
    write_atomically(order, settings.to_yaml(content))
    jobs.submit(["train", "--preset", str(order), "--run", str(run), "--name", name], run)
    jobs.advance()
    return run
