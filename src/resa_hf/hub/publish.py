"""The work of `resa-hf publish`: everything is put together and checked before anything goes up."""

import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo

from ..errors import PublishError
from .adapter_repo import stage_adapter, with_base, write_card
from .arguments import PublishArguments
from .folder_contents import Found, find, reading_reports
from .merged_repo import stage_merged
from .record import Record
from .sae_repo import stage_saes
from .staging import staged
from .upload import prepare_repo, publishable, upload


def publish(args: PublishArguments, *, dry_run: bool = False) -> list[CommitInfo]:
    """
    Publishes what a folder holds: the SAEs first, so that the adapter's card can name their commit.

    Args:
        args ([`PublishArguments`]):
            What, and where to.
        dry_run (`bool`, *optional*, defaults to `False`):
            Put everything together, print the cards and the files with their sizes, upload nothing.

    Returns:
        `list[CommitInfo]`: one a repository; empty after a dry run.

    Raises:
        `PublishError`: if something cannot be published. If it is the adapter, the SAEs may be there already; the
            message then says so.
    """
    if dry_run:
        # The folder stays as it is: it may be read-only.
        with tempfile.TemporaryDirectory() as temporary:
            with reading_reports(Path(args.folder)):
                _, stages = _staged(args, Path(temporary))
            print("\n\n".join(_described(repo_id, stage) for repo_id, stage in stages.items()))
        return []
    with reading_reports(Path(args.folder)):
        found, stages = _staged(args, Path(args.folder))
    for repo_id in stages:
        prepare_repo(repo_id, private=args.private)
    commits: list[CommitInfo] = []
    for repo_id, stage in stages.items():
        if commits:
            # The SAEs are up.
            published = _with_sae(found.record, str(args.sae_repo_id), commits[0].oid)
            write_card(stage, repo_id, replace(found, record=published), args.sae_repo_id, merged=args.merge)
        try:
            commits.append(
                upload(stage, repo_id, private=args.private, branch=args.branch, message="Upload with resa-hf")
            )
        except PublishError as error:
            done = f" The SAEs are published: {commits[0]}." if commits else ""
            raise PublishError(f"{error}{done}") from error
    return commits


def _staged(args: PublishArguments, home: Path) -> tuple[Found, dict[str, Path]]:
    """What is found, and in `home` by repository the folders that are to go up, the SAEs' first."""
    folder = Path(args.folder)
    evaluation = None if args.evaluation is None else Path(args.evaluation)
    found = find(folder, arm=args.arm, seed=args.seed, evaluation=evaluation)
    stages: dict[str, Path] = {}
    if args.sae_repo_id is not None:
        with staged(home, args.sae_repo_id) as stages[args.sae_repo_id]:
            stage_saes(stages[args.sae_repo_id], args.sae_repo_id, found.trained_with or found, sparsify=args.sparsify)
    if args.repo_id is not None:
        if found.adapter is None:
            raise PublishError(f"{folder} holds no adapter. For its SAEs, set sae_repo_id and not repo_id.")
        if not args.merge:
            found = replace(found, record=with_base(found.record, args.base))
        with staged(home, args.repo_id) as stages[args.repo_id]:
            if args.merge:
                found = stage_merged(stages[args.repo_id], found)
            else:
                stage_adapter(stages[args.repo_id], found)
            write_card(stages[args.repo_id], args.repo_id, found, args.sae_repo_id, merged=args.merge)
    return found, stages


def _with_sae(record: Record, sae_repo: str, commit: str) -> Record:
    return replace(record, revisions={**record.revisions, "sae": {"name": sae_repo, "commit": commit}})


def _described(repo_id: str, stage: Path) -> str:
    """The card, and the files with their sizes."""
    card = (stage / "README.md").read_text(encoding="utf-8")
    sizes = [f"{path.stat().st_size:>14,}  {name}" for name, path in publishable(stage).items()]
    return "\n".join([card, f"{repo_id} would hold, in bytes:", *sizes])
