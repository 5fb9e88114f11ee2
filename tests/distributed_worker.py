"""What each of several processes does in tests/test_distributed_*.py, one job after the other; started by torchrun.

python tests/distributed_worker.py KIND JOBS, where JOBS is a list of [STAGE, FOLDER, SETTINGS] in JSON
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType

FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}
EXPECTED = {
    "alone": DistributedType.NO,
    "ddp": DistributedType.MULTI_CPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def let_fsdp_run_on_cpus():
    """accelerate runs DDP on CPUs where FSDP2 is asked for, and says nothing; torch's FSDP2 itself knows gloo."""
    made = accelerate_state.AcceleratorState.__init__

    def init(self, *args, **kwargs):
        first = not accelerate_state.AcceleratorState._shared_state
        made(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if first and plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate_state.AcceleratorState.__init__ = init


def settings_of(kind):
    """TrainingArguments that make Trainer run so on CPUs."""
    if kind == "fsdp2":
        return {"fsdp": True, "fsdp_config": dict(FSDP), "use_cpu": True}
    if kind in ("zero2", "zero3"):
        return {"use_cpu": False, "ddp_backend": "gloo"}
    return {"use_cpu": True}


def check(trainer, kind):
    assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    assert trainer.accelerator.num_processes == (1 if kind == "alone" else 2)
    assert trainer.accelerator.distributed_type == EXPECTED[kind], trainer.accelerator.distributed_type


def write(trainer, folder, **more):
    if trainer.is_world_process_zero():
        Path(folder, "told.json").write_text(json.dumps({"log": trainer.state.log_history, **more}))


def tune(kind, folder, settings):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from tuning_reference import make_trainer, tiny_model, tiny_sae

    from resa_hf.tuning.config import SAETuningConfig

    settings = dict(settings)
    rows, lengths, name = settings.pop("rows"), settings.pop("lengths"), settings.pop("model")
    resume = settings.pop("resume", None)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 56, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(rows)]
    source = tiny_model(5, torch.float32) if settings.get("kl_reference") == "source" else None
    more = settings_of(kind)
    # As `resa-hf tune` does it, the arguments first: from then on ZeRO-3 has models loaded in parts.
    arguments = SAETuningConfig(output_dir=folder, bf16=False, report_to="none", **more)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    assert kind != "zero3" or all(parameter.numel() == 0 for parameter in model.parameters()), arguments
    torch.manual_seed(4)
    trainer = make_trainer(
        model,
        folder,
        sae=tiny_sae(torch.float32),
        source_model=source,
        dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        **{"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, **settings, **more},
    )
    trainer.train(resume_from_checkpoint=resume)
    check(trainer, kind)
    evaluated = trainer.evaluate(trainer.train_dataset)
    trainer.save_model(folder)
    write(trainer, folder, evaluated=evaluated)


def train_saes(kind, folder, settings):
    from conftest import _make_model
    from datasets import Dataset
    from sae_reference import config, rows

    from resa_hf.sae.trainer import SAETrainer

    settings = dict(settings)
    count, resume = settings.pop("rows"), settings.pop("resume", None)
    args = config(Path(folder), **{"use_cpu": True, **settings})
    # Rows of several lengths, so that processes have different numbers of tokens in a step.
    dataset = Dataset.from_dict({"input_ids": [ids[: 16 - at % 5] for at, ids in enumerate(rows(count)["input_ids"])]})
    trainer = SAETrainer(_make_model("qwen2", num_hidden_layers=4), args, dataset, rows(7, seed=1))
    trainer.train(resume_from_checkpoint=resume)
    check(trainer, kind)
    evaluated = trainer.evaluate()
    trainer.save_model(str(folder))
    write(trainer, folder, evaluated=evaluated)


def train_rl(kind, folder, settings):
    from unittest import mock

    from transformers import GenerationMixin

    from resa_hf.arguments import DataArguments, LoraArguments, ModelArguments
    from resa_hf.rl import run
    from resa_hf.rl.config import RLConfig

    settings = dict(settings)
    generate = fixed_completions if settings.pop("fixed") else GenerationMixin.generate
    lengths, made = [], run._trainer

    def counted(model, input_ids, **kwargs):
        whole = generate(model, input_ids=input_ids, **kwargs)
        lengths.append(whole.shape[1] - input_ids.shape[1])
        return whole

    def checked(*args):
        trainer = made(*args)
        check(trainer, kind)
        return trainer

    args = RLConfig(output_dir=folder, report_to="none", disable_tqdm=True, **settings, **settings_of(kind))
    data = DataArguments(dataset="tiny-reasoner", limit=600, held_out=8, template="chat")
    model = ModelArguments(model_name_or_path="resa_hf/tiny/base", dtype="float32")
    lora = LoraArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0)
    with mock.patch.object(run, "_trainer", checked), mock.patch.object(GenerationMixin, "generate", counted):
        run.train_rl(model, lora, data, args, {})
    Path(folder, f"lengths-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(lengths))


def fixed_completions(model, input_ids, attention_mask, generation_config, **kwargs):
    """A stand-in for `generate`: the answers to a prompt, four of them, are the same in whichever process."""
    answers = []
    for at, (prompt, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        weights = torch.arange(1, int(mask.sum()) + 1)
        generator = torch.Generator().manual_seed(int((prompt[mask.bool()] * weights).sum()) * 4 + at % 4)
        length = int(torch.randint(5, 20, (), generator=generator))
        answers.append(torch.randint(3, 56, (length,), generator=generator))
    ends = torch.tensor(generation_config.eos_token_id).flatten()[:1]
    return torch.cat(
        [input_ids, torch.nn.utils.rnn.pad_sequence([torch.cat([a, ends]) for a in answers], True, ends.item())], dim=1
    )


STAGES = {"tune": tune, "train_saes": train_saes, "train_rl": train_rl}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fsdp2":
        let_fsdp_run_on_cpus()
    if sys.argv[1].startswith("zero"):
        # As `accelerate launch` has it from recipes/accelerate_configs.
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": sys.argv[1][-1]}
    for stage, folder, settings in json.loads(sys.argv[2]):
        STAGES[stage](sys.argv[1], folder, settings)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
