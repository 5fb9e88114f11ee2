"""What happens to the SAEs beside the steps of Stage I."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import SAETrainer


class DecoderNorm(TrainerCallback):
    """Keeps decoder rows at norm 1, and leaves the average of the iterates in the SAEs when training ends."""

    def __init__(self, trainer: "SAETrainer") -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.use_average(False)  # the weights of a checkpoint are the average

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for sae in self._trainer.saes.values():
            sae.remove_parallel_decoder_gradient()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for sae in self._trainer.saes.values():
            sae.unit_norm_decoder()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (args.load_best_model_at_end and state.best_model_checkpoint):  # then the best has just been loaded
            self._trainer.use_average(True)
