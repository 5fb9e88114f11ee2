"""
Makes this folder a Space on the Hub, with the package as it is in this checkout, and with results of your own.

    python spaces/resa-explorer/push.py --repo_id me/resa-explorer --results runs/demo runs/tiny-reasoner/sweep

Builds the package's wheel, and uploads it with the app in one commit. To be run again after a change: what the Space
no longer needs, such as the wheel before, is removed in the same commit.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, hf_hub_url

from resa_hf.errors import PublishError
from resa_hf.escaping import shown_all, without_token
from resa_hf.experiment.folder import read_json, write_json
from resa_hf.explore.results import REPORT, TEXT, Result, adapters_of, find_results, report_text, runs_of, saes_of
from resa_hf.hub.retries import patiently, publish_errors
from resa_hf.hub.upload import SPACE_KINDS, check_repo_id, publishable, upload

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def push(repo_id: str, results: Sequence[Path], hardware: str, *, dry_run: bool = False) -> CommitInfo | None:
    """
    Puts the Space together and uploads it.

    Args:
        repo_id (`str`):
            The Space, `owner/name`; made if missing.
        results (sequence of `Path`):
            Output folders of commands, or folders that hold such.
        hardware (`str`):
            What a new Space runs on, as the Hub calls it; one that is there keeps its own. All but `cpu-...` get torch
            with CUDA.
        dry_run (`bool`, *optional*, defaults to `False`):
            Upload nothing.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, `None` after a dry run.

    Raises:
        `PublishError`: if nothing was published; the message says why, and what to do.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        for name in ("app.py", "README.md"):
            shutil.copyfile(HERE / name, stage / name)
        wheel = build_wheel(stage)
        copy_results(results, stage / "results")
        publishable(stage, SPACE_KINDS)  # what is refused is refused before there is a Space
        hardware = hardware if dry_run else make_space(repo_id, hardware)
        text = requirements(wheel, repo_id, on_cpu=hardware.startswith("cpu-"))
        (stage / "requirements.txt").write_text(text)
        sizes = {name: path.stat().st_size for name, path in publishable(stage, SPACE_KINDS).items()}
        print("\n".join(f"{size:>14,}  {name}" for name, size in {**sizes, "in all": sum(sizes.values())}.items()))
        if dry_run:
            return None
        return upload(stage, repo_id, message="Upload with resa-hf", repo_type="space")


def build_wheel(target: Path) -> Path:
    """The package as it is in this checkout, as a wheel in `target`."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target.resolve())]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if built.returncode != 0:
        why = built.stderr.strip().rpartition("\n")[2]
        raise PublishError(f"The wheel could not be built: {why}. What builds it: pip install 'hatchling>=1.27'")
    (wheel,) = target.glob("*.whl")
    return wheel


def requirements(wheel: Path, repo_id: str, *, on_cpu: bool) -> str:
    """
    requirements.txt of the Space.

    The Hub installs it before it copies the other files, so the wheel has an address, and no path. Its hash keeps the
    Hub from taking an older wheel of the same name out of its cache.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", line.replace("_", "-"))[0] for line in project["dependencies"]}
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    pins = "\n".join(line for line in tested if line.partition("==")[0] in declared)
    address = hf_hub_url(repo_id, wheel.name, repo_type="space")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    text = (HERE / "requirements.txt").read_text()
    text = text.replace("\nresa-hf\n", f"\nresa-hf @ {address}#sha256={digest}\n{pins}\n")
    return text if on_cpu else re.sub("--extra-index-url .*\n", "", text)


def copy_results(folders: Sequence[Path], target: Path) -> None:
    """
    Of each report what the app shows: the report, its pictures, and the first seed's adapters and SAEs; no answers, no
    data, no logs, and no paths of this machine. What a report names outside its own folder is left out.
    """
    for folder in folders:
        results = find_results([folder])
        if not results:
            raise PublishError(f"There is no {REPORT} of resa-hf in {folder}, nor in a folder in it.")
        for result in results:
            place = target / result.folder.name
            if place.exists():
                raise PublishError(f"Two results are named {result.folder.name}; rename the folder of one of them.")
            _copy_result(result, place)


def _copy_result(result: Result, target: Path) -> None:
    adapters, saes = adapters_of(result).values(), saes_of(result).values()
    runs = [folder for folder, _ in runs_of(result)]
    told = {result.folder / REPORT, *(folder / name for folder in runs for name in (REPORT, "shared.json"))}
    told |= {folder / "adapter_config.json" for folder in adapters}
    told |= {path for folder in saes for path in folder.glob("*/cfg.json")}
    copied = [path for folder in adapters for path in folder.glob("adapter_model.safetensors")]
    copied += [path for folder in saes for path in folder.glob("*/*.safetensors")]
    copied += [path for pattern in ("report*.png", "pictures/*.png") for path in result.folder.glob(pattern)]
    for path in sorted({*told, *copied}):
        if not path.is_file() or not path.resolve().is_relative_to(result.folder):
            continue
        copy = target / path.relative_to(result.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path in told:
            write_json(copy, shown_all(without_token(read_json(path))))
        else:
            shutil.copyfile(path, copy)
    (target / TEXT).write_text(report_text(result), encoding="utf-8")


def make_space(repo_id: str, hardware: str) -> str:
    """Makes the Space, if it is missing; returns what it runs on."""
    api = HfApi()
    with publish_errors(f"{repo_id} was not published."):
        patiently(
            lambda: api.create_repo(
                repo_id, repo_type="space", space_sdk="gradio", space_hardware=hardware, exist_ok=True
            )
        )
        space = patiently(lambda: api.space_info(repo_id))
        if space.private:
            raise PublishError(
                f"{repo_id} is private, and the Hub could not install the wheel from there. Make it public, or name "
                "another Space; nothing was uploaded."
            )
    return str((space.runtime and space.runtime.requested_hardware) or hardware)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, help="the Space, owner/name; made if missing")
    parser.add_argument("--results", nargs="*", type=Path, default=[], help="output folders of resa-hf's commands")
    parser.add_argument(
        "--hardware", default="cpu-basic", help="of a new Space, such as zero-a10g (default: %(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be uploaded, with sizes")
    args = parser.parse_args(argv)
    try:
        commit = push(args.repo_id, args.results, args.hardware, dry_run=args.dry_run)
    except (ValueError, OSError) as error:
        print(f"\npush.py: {error}", file=sys.stderr)
        return 2
    print(f"Published: {commit.repo_url}, commit {commit}." if commit else "Nothing was uploaded.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
