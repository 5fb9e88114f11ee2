"""`push_to_hub` and the model card of the trainers."""

from typing import Any


class PushToHub:
    """
    A mixin for a [`~transformers.Trainer`]: the repository and the card are those of `resa-hf publish`.

    Three things differ from the Trainer's own: no pickle goes up, all is one commit, and the card says what this
    trainer knows and no more. For one with a verdict, publish the output of `resa-hf run` or `evaluate` by
    `resa-hf publish`. During training nothing is pushed (`hub_strategy` counts as `"end"`), since the state of a
    checkpoint is pickles; `push_to_hub: true` pushes when `save_model` is called.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Makes the repository, before anything is trained for it.

        Args:
            token (`str`, *optional*):
                `None`: `args.hub_token`, or the saved one.
            private (`bool`, *optional*):
                `None`: `args.hub_private_repo`.

        Raises:
            `PublishError`: if the Hub does not let it be made, or does not answer.
        """
        from .hub.trainer_push import make_repo

        make_repo(self, super().init_hf_repo, token, private)  # type: ignore[arg-type, misc]

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Saves, and uploads to `args.hub_model_id` (by default the user's repository named as the output folder).

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Return when it is done.
            token (`str`, *optional*):
                `None`: `args.hub_token`, or the saved one.
            revision (`str`, *optional*):
                Branch, made if missing. `None`: `args.hub_revision`, or `main`.
            private (`bool`, *optional*):
                Make the repository private. One that is there already must be. `None`: `args.hub_private_repo`.
            kwargs (`dict[str, Any]`, *optional*):
                Those of the Trainer, for its own card; they have no use here.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it if not `blocking`; `None` on all processes but the
            first.

        Raises:
            `PublishError`: if it cannot be published; nothing was uploaded then.
        """
        from .hub.trainer_push import push  # what publishes knows the trainers, and not the other way round

        return push(self, commit_message or "End of training", blocking, token, revision, private)  # type: ignore[arg-type]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """
        Writes the card that would be published now into the output folder.

        Args:
            args, kwargs: Those of the Trainer, for its own card; they have no use here.
        """
        from .hub.trainer_push import write_draft

        write_draft(self)  # type: ignore[arg-type]
