"""The settings of `resa-hf features`."""

from dataclasses import dataclass, field

from ..arguments import DataArguments, ModelArguments, unset_none
from ..evaluation.engine import Sampling
from ..prose import PYTHON_DOCS
from .reasoning import CUES


@dataclass
class FeatureArguments(ModelArguments, DataArguments):
    """
    What `resa-hf features` reads: [`ModelArguments`] name the model, [`DataArguments`] the problems. Their held-out
    part is used, so that with Stage I's own settings no SAE has seen it.

    Args:
        saes (`str`):
            A folder or Hub repository of SAEs, `owner/name@revision/sub/folder`: one or more hookpoints.
        hookpoints (`list[str]`, *optional*):
            Those of them to read, as folder names in it. `None`: all.
        prompt (`str`, *optional*):
            The text in which latents are looked for. `None`: DeepSeek-R1's system prompt, as in the paper.
        cues (`list[str]`, *optional*, defaults to `["<think>", "</think>"]`):
            The tokens at which a reasoning latent is active, and nowhere else in the prompt.
        every_occurrence (`bool`, *optional*, defaults to `False`):
            It must be active at each occurrence of each cue. `False`: at one of each.
        components (`int`, *optional*):
            Of the mixture over layers; the paper has 3. `None`: as many as the BIC chooses.
        prose (`str`, *optional*, defaults to `"python-docs"`), passages (`int`, *optional*, defaults to `100`):
            Ordinary prose into which the cues are put for the control, and how often.
        test_hookpoint (`str`, *optional*):
            Whose latents are tested. `None`: the suggested one, or where nothing is suggested the first.
        test_latents (`list[int]`, *optional*):
            Which. `None`: its reasoning latents; where it has none, those with the largest attribution on the first
            half of the problems, which are tested on the other half.
        tested (`int`, *optional*, defaults to `8`):
            Test this many at most.
        amplify (`float`, *optional*, defaults to `2.0`):
            The factor of the amplification.
        problems (`int`, *optional*, defaults to `100`):
            Held-out problems that are answered, untouched and with the tested latents edited together. 0: none; the
            effect on next-token KL is then measured on the problems' CoT-free text.
        nulls (`int`, *optional*, defaults to `99`), answer_nulls (`int`, *optional*, defaults to `19`):
            Sets of random latents of matched firing rate and norm that each edit is compared with, by KL and by
            answers. p cannot be below 1 / (1 + their number).
        examples (`int`, *optional*, defaults to `5`):
            Top activating examples of each latent that is tested.
        other_model (`str`, *optional*), other_adapter (`str`, *optional*), other_revision (`str`, *optional*):
            A second model on which the tested hookpoint's SAE is read, too.
        other_saes (`str`, *optional*):
            Its own SAEs, whose latents are matched with the first's.
        temperature, top_p, samples, max_new_tokens, batch_size:
            As in [`Sampling`]; the paper's temperature and top-p.
        max_length (`int`, *optional*, defaults to `2048`):
            Tokens of a text at most.
        seed (`int`, *optional*, defaults to `0`):
            Of everything random.
        output_dir (`str`, *optional*, defaults to `"runs/features"`):
            Where everything lies afterwards. Started again with the same settings, it goes on where it stopped.

    Raises:
        `ValueError`: for a value that is missing or out of range.
    """

    saes: str = field(default="", metadata={"help": "Folder or Hub repo of SAEs, at one or more hookpoints."})
    hookpoints: list[str] | None = field(default=None, metadata={"help": "Those of them to read; default: all."})
    prompt: str | None = field(default=None, metadata={"help": "Text to look in; default: R1's system prompt."})
    cues: list[str] = field(default_factory=lambda: list(CUES), metadata={"help": "Tokens to be active at."})
    every_occurrence: bool = field(default=False, metadata={"help": "Active at each occurrence of each cue."})
    components: int | None = field(default=None, metadata={"help": "Of the mixture; default: chosen by the BIC."})
    prose: str = field(default=PYTHON_DOCS, metadata={"help": "Ordinary prose for the control."})
    passages: int = field(default=100, metadata={"help": "Passages of prose that the cues are put into."})
    test_hookpoint: str | None = field(default=None, metadata={"help": "Whose latents are tested."})
    test_latents: list[int] | None = field(default=None, metadata={"help": "Latents to test; default: reasoning."})
    tested: int = field(default=8, metadata={"help": "Test this many at most."})
    amplify: float = field(default=2.0, metadata={"help": "Factor of the amplification."})
    problems: int = field(default=100, metadata={"help": "Held-out problems that are answered; 0: none."})
    nulls: int = field(default=99, metadata={"help": "Matched random latents of each edit, by KL."})
    answer_nulls: int = field(default=19, metadata={"help": "The same, by answers."})
    examples: int = field(default=5, metadata={"help": "Top activating examples of a latent."})
    other_model: str | None = field(default=None, metadata={"help": "A second model to read."})
    other_adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of the second model."})
    other_revision: str | None = field(default=None, metadata={"help": "Revision of the second model."})
    other_saes: str | None = field(default=None, metadata={"help": "The second model's own SAEs."})
    temperature: float = field(default=0.6, metadata={"help": "0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling."})
    samples: int = field(default=1, metadata={"help": "Answers a problem."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Longer completions are cut."})
    batch_size: int = field(default=64, metadata={"help": "Completions generated at once."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a text at most."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    output_dir: str = field(default="runs/features", metadata={"help": "Where everything lies afterwards."})

    def __post_init__(self) -> None:
        ModelArguments.__post_init__(self)
        DataArguments.__post_init__(self)
        unset_none(self, "prompt", "components", "test_hookpoint")
        unset_none(self, "other_model", "other_adapter", "other_revision", "other_saes")
        if not self.saes:
            raise ValueError("saes is not set: name a folder or a Hub repository of SAEs.")
        if not self.cues:
            raise ValueError("cues is empty: name at least one token, such as <think>.")
        if self.other_saes is not None and not self.has_other:
            raise ValueError("other_saes needs other_model or other_adapter: the model that they are read on.")
        bounds = {"passages": 2, "tested": 1, "nulls": 2, "answer_nulls": 2, "examples": 1, "max_length": 2}
        for name, low in ({"problems": 0, "components": 1} | bounds).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}.")
        if self.problems > self.held_out:
            raise ValueError(f"problems is {self.problems}, but only {self.held_out} are held out: raise held_out.")
        if self.problems == 1:
            raise ValueError("problems is 1; an interval over problems needs at least 2.")
        self.sampling()

    @property
    def has_other(self) -> bool:
        """Whether there is a second model."""
        return self.other_model is not None or self.other_adapter is not None

    def sampling(self) -> Sampling:
        """As the engines take it."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
        )
