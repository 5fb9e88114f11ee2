"""The settings of `resa-hf publish`."""

from dataclasses import dataclass, field

from ..arguments import unset_none


@dataclass
class PublishArguments:
    """
    What `resa-hf publish` takes.

    Args:
        folder (`str`):
            Output folder of a command, or a plain adapter's or SAEs'.
        repo_id (`str`, *optional*):
            Repository of the adapter, or of the merged model: `owner/name`. `None`: only the SAEs are published.
        sae_repo_id (`str`, *optional*):
            Repository of the SAEs, which go up first; the adapter's card then names their commit. `None`: only the
            adapter is published.
        arm (`str`, *optional*):
            Of a run with several arms: whose adapter.
        seed (`int`, *optional*):
            Of a run with several seeds: which one. `None`: the first.
        evaluation (`str`, *optional*):
            `report.json` of `resa-hf evaluate`, of this very adapter, for the card.
        merge (`bool`, *optional*, defaults to `False`):
            Publish the base with the adapter merged into it, in the base's dtype.
        sparsify (`bool`, *optional*, defaults to `False`):
            Write the SAEs in sparsify's layout, too.
        private (`bool`, *optional*, defaults to `False`):
            Make the repositories private. Those that are there already must be.
        branch (`str`, *optional*):
            Made if missing. `None`: `main`.
        base (`str`, *optional*):
            Repository of the adapter's base, where it was trained on a folder.

    Raises:
        `ValueError`: if there is no folder or no repository, or if settings contradict each other.
    """

    folder: str = field(default="", metadata={"help": "Output folder of a command, or a plain adapter's or SAEs'."})
    repo_id: str | None = field(default=None, metadata={"help": "Repository of the adapter or the merged model."})
    sae_repo_id: str | None = field(default=None, metadata={"help": "Repository of the SAEs; they go up first."})
    arm: str | None = field(default=None, metadata={"help": "Of a run with several arms: whose adapter."})
    seed: int | None = field(default=None, metadata={"help": "Of a run with several seeds; default: the first."})
    evaluation: str | None = field(default=None, metadata={"help": "report.json of resa-hf evaluate, of this one."})
    merge: bool = field(default=False, metadata={"help": "Publish the base with the adapter merged into it."})
    sparsify: bool = field(default=False, metadata={"help": "Write the SAEs in sparsify's layout, too."})
    private: bool = field(default=False, metadata={"help": "Make the repositories private."})
    branch: str | None = field(default=None, metadata={"help": "Made if missing; default: main."})
    base: str | None = field(default=None, metadata={"help": "Repository of the base, where it was a folder."})

    def __post_init__(self) -> None:
        unset_none(self, "repo_id", "sae_repo_id", "arm", "seed", "evaluation", "branch", "base")
        if not self.folder:
            raise ValueError("folder is not set: name the output folder of run, compare, demo, tune or train-sae.")
        if self.repo_id is None and self.sae_repo_id is None:
            raise ValueError("Nothing to do: set repo_id (of the adapter), sae_repo_id (of the SAEs), or both.")
        if self.merge and self.base is not None:
            raise ValueError("base says where others find the adapter's base, and a merged model (merge) needs none.")
        if self.repo_id == self.sae_repo_id:
            raise ValueError(f"repo_id and sae_repo_id are both {self.repo_id!r}: each needs a repository of its own.")
