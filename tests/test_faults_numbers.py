"""Numbers that are not finite, and memory that is full: what is told names the cause, and what is done is kept."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sae_reference import config, logged, rows, same, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tuning_reference import make_trainer, tiny_model, tiny_sae

from resa_hf import checkpoints as whole
from resa_hf.cli import main as resa_hf
from resa_hf.errors import AnswerError, DataError, MemoryFullError, TrainingError
from resa_hf.evaluation.decoding import decode
from resa_hf.evaluation.engine import Sampling
from resa_hf.evaluation.in_process import TransformersEngine
from resa_hf.experiment.stages import train_from_last_checkpoint
from resa_hf.full_memory import is_out_of_memory, what_was_asked
from resa_hf.sae.trainer import SAETrainer
from resa_hf.tiny import tiny_path
from resa_hf.tiny.task import make_rows

NAN, INF = float("nan"), float("inf")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def poison(module, number, calls=None):
    """`number` in the module's output, at those of its calls, counted from 1, or at all."""
    seen = []

    def hook(module, inputs, output):
        seen.append(1)
        return output * number if calls is None or len(seen) in calls else output

    return module.register_forward_hook(hook)


def break_weight(model, name, number=NAN):
    weight = model.get_parameter(name).data
    weight[(0,) * weight.dim()] = number
    return model


def copy_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_path("base") / name, folder)


def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer, name="x")


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.9}])
@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_no_token_is_drawn_from_logits_that_are_not_finite(tiny_base, tiny_tokenizer, sampling, number, fault):
    answering = engine(tiny_base, tiny_tokenizer)
    settings = Sampling(max_new_tokens=8, **sampling)
    wanted = answering.generate(["12-5="], settings, progress=False)
    # At the second of the tokens: the prompt is read, then a token at a time.
    handle = poison(tiny_base.model.layers[1], number, calls=[2])
    with pytest.raises(
        AnswerError, match="after 1 new tokens.*all weights are finite.*overflow in torch.float32"
    ) as at:
        answering.generate(["12-5="], settings, progress=False)
    handle.remove()
    fault("infinity or NaN in an activation, at evaluation", told=at.value, kept="finished batches; the rerun answers")
    assert answering.generate(["12-5="], settings, progress=False) == wanted


def test_a_weight_that_is_not_finite_is_named_when_a_model_answers(tiny_base, tiny_tokenizer, fault):
    broken = break_weight(tiny_base, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(AnswerError, match=r"the weight model.layers.1.mlp.up_proj.weight of Qwen2ForCausalLM") as at:
        engine(broken, tiny_tokenizer).generate(["1+1="], Sampling(max_new_tokens=4), progress=False)
    fault("NaN in a model's weight, at evaluation", told=at.value, kept="answers of the models before it")


def test_tokens_of_minus_infinity_are_fine():
    def only_five(module, inputs, output):
        output.logits[..., 5:] = -INF

    model = tiny_model(dtype=torch.float32).eval()
    model.register_forward_hook(only_five)
    with torch.no_grad():
        found = dict(decode(model, [(3, 4)], lambda logits, *_: logits.argmax(-1), ends=set(), limit=3))
    assert len(found[0]) == 3 and max(found[0]) < 5


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_answered(make_model, tiny_tokenizer, fault):
    small = make_model("qwen2", vocab_size=8)
    with pytest.raises(DataError, match=r"A prompt has the token \d+, but the model has embeddings of 8 tokens") as at:
        engine(small, tiny_tokenizer).generate(["3-1="], Sampling(max_new_tokens=4), progress=False)
    fault("the tokenizer of another model, at evaluation", told=at.value, kept="everything: nothing was begun")


@pytest.mark.long
def test_prompts_of_another_tokenizer_are_refused_before_reinforcement(tmp_path, capsys, fault):
    model = AutoModelForCausalLM.from_pretrained(tiny_path("base"))
    model.resize_token_embeddings(12)
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(tmp_path / "model")
    recipe = Path(__file__).parents[1] / "recipes/tiny-reasoner/rl/grpo.yaml"
    words = ["--config", str(recipe), "--limit", "900", "--output_dir", str(tmp_path / "out")]
    assert resa_hf(["train-rl", *words, "--model_name_or_path", str(tmp_path / "model")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "A prompt has the token" in told and "the model has embeddings of 12 tokens (0 to 11)" in told
    assert not any((tmp_path / "out").glob("checkpoint-*"))
    fault("the tokenizer of another model, before RL", told=told, kept="everything: nothing was begun")


def test_a_weight_that_is_not_finite_stops_stage_2_before_its_first_step(tmp_path, fault):
    model = break_weight(tiny_model(dtype=torch.float32), "model.layers.2.mlp.up_proj.weight", INF)
    with pytest.raises(TrainingError, match=r"weight model.layers.2.mlp.up_proj\S+ of Qwen2ForCausalLM") as at:
        make_trainer(model, tmp_path, sae=tiny_sae(torch.float32), peft_config=LORA)
    fault("infinity in the target's weight, Stage II", told=at.value, kept="everything: nothing was begun")


@pytest.mark.parametrize("name", ["W_enc", "b_dec"])
def test_an_sae_whose_weight_is_not_finite_is_named_in_stage_2(tmp_path, name, fault):
    sae = break_weight(tiny_sae(torch.float32), name)
    trainer = make_trainer(tiny_model(dtype=torch.float32), tmp_path, sae=sae, peft_config=LORA, max_steps=8)
    with pytest.raises(TrainingError, match=rf"The cause: the weight module.{name} of Insertion") as at:
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    fault(f"NaN in an SAE's {name}, Stage II", told=at.value, kept="the adapter as it was, and the batch")


def test_a_source_whose_weight_is_not_finite_is_named_in_stage_1(make_model, tmp_path, fault):
    model = break_weight(make_model("qwen2"), "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(TrainingError, match=r"The cause: the weight model.layers.0.mlp.up_proj.weight") as at:
        SAETrainer(model, config(tmp_path, max_steps=8), rows(24)).train()
    fault("NaN in the source's weight, Stage I", told=at.value, kept="the checkpoints before, and the batch")


@pytest.mark.parametrize("step", [1, 3])
def test_one_activation_that_is_not_finite_costs_stage_1_one_step(make_model, tmp_path, step, fault):
    """Also in the first batch, whose mean b_dec starts from."""
    model = make_model("qwen2")
    trainer = SAETrainer(model, config(tmp_path, logging_steps=1), rows(24), rows(4))
    poison(model.model.layers[1], NAN, calls=[step])
    trainer.train()
    assert trainer.skipped_steps == 1 and logged(trainer, "skipped_steps")[-1] == 1
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert logged(trainer, "fvu/layers.1")[-1] < 1 and trainer.evaluate()["eval_fvu/layers.1"] < 1
    told = f"skipped_steps: 1, from step {step} on in the log"
    fault(f"NaN in an activation, Stage I, step {step}", told=told, kept="all but that step's update")


@pytest.mark.slow
def test_one_activation_that_is_not_finite_costs_stage_2_one_step(tmp_path, fault):
    def run(folder, poisoned):
        model = tiny_model(dtype=torch.float32)
        trainer = make_trainer(model, folder, sae=tiny_sae(torch.float32), peft_config=LORA, max_steps=4)
        step, handles = trainer.training_step, []

        def training_step(*args, **kwargs):
            if trainer.state.global_step == 2 and poisoned:
                handles.append(poison(model.model.layers[2], NAN))
            loss = step(*args, **kwargs)
            for handle in handles:
                handle.remove()
            return loss

        trainer.training_step = training_step
        if not poisoned:
            optimizer = trainer.create_optimizer()
            take, calls = optimizer.step, []
            optimizer.step = lambda *a, **k: calls.append(1) or (None if len(calls) == 3 else take(*a, **k))
        trainer.train()
        return trainer

    found, wanted = run(tmp_path / "a", True), run(tmp_path / "b", False)
    assert found.skipped_steps == 1 and wanted.skipped_steps == 0
    adapters = [{n: p.data for n, p in t.model.named_parameters() if "lora" in n} for t in (found, wanted)]
    assert same(*adapters)
    fault("NaN in an activation, Stage II", told="skipped_steps: 1 in the log", kept="all but that step's update")


@pytest.mark.long
def test_a_checkpoint_with_a_broken_adapter_is_not_trained_on(tmp_path, fault):
    def trainer():
        settings = {"save_strategy": "steps", "save_steps": 2, "peft_config": LORA, "max_steps": 9}
        return make_trainer(tiny_model(dtype=torch.float32), tmp_path, sae=tiny_sae(torch.float32), **settings)

    first = trainer()
    first.training_step = stop_after(first, 4)
    with pytest.raises(KeyboardInterrupt):
        train_from_last_checkpoint(first)
    path = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = NAN
    save_file(tensors, path, metadata={"format": "pt"})
    # As if it had been written so: else its digest tells, and the one before is taken.
    whole._seal(path.parent)
    with pytest.raises(TrainingError, match=r"1 trained weights are not finite at step 6 .*lora_A") as at:
        train_from_last_checkpoint(trainer())
    path.write_bytes(b"")
    resumed = trainer()
    train_from_last_checkpoint(resumed)
    assert resumed.state.global_step == 9 and (tmp_path / "torn-checkpoint-4").is_dir()
    fault(
        "NaN in an adapter's weight at resume", told=at.value, kept="the checkpoint before: without this one, it ends"
    )


def stop_after(trainer, step):
    do = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return do(*args, **kwargs)

    return training_step


def test_memory_that_is_full_while_answering_is_told_in_settings(tiny_base, tiny_tokenizer, tmp_path, fault):
    answering = engine(tiny_base, tiny_tokenizer)
    settings = Sampling(max_new_tokens=300, batch_size=2, samples=2)
    store, prompts = tmp_path / "kept.jsonl", ["1+1=", "12-5="]

    def fill(*given):
        if store.read_text().count("\n") > 1:
            torch.empty(2**50)

    handle = tiny_base.register_forward_hook(fill)
    with pytest.raises(MemoryFullError, match="you tried to allocate") as at:
        answering.generate(prompts, settings, store=store, progress=False)
    handle.remove()
    for change in ("batch_size: 1 (now 2)", "load_in_4bit: true", "max_new_tokens: 150 (now 300)"):
        assert change in str(at.value)
    kept = store.read_text()
    assert len(answering.generate(prompts, settings, store=store, progress=False)) == 2
    assert store.read_text().startswith(kept)
    fault("memory full while a batch is answered", told=at.value, kept="finished batches; the rerun ends")


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB."),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (MemoryError(), "MemoryError"),
        (OSError(12, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "libx.so: failed to map segment"),
    ],
)
def test_full_memory_is_recognised_and_its_amount_told(error, asked):
    assert is_out_of_memory(error) and what_was_asked(error).startswith(asked)
    assert not is_out_of_memory(RuntimeError("shapes")) and not is_out_of_memory(OSError(2, "No such file"))


DATA = ["--dataset", "tiny-reasoner", "--limit", "120", "--held_out", "21", "--template", "chat", "--use_cpu"]
STAGE = [*DATA, "--max_steps", "3", "--report_to", "none", "--max_length", "64", "--dtype", "float32"]
SAES = ["--hookpoints", "layers.1", "layers.2", "--k", "4", "--save_strategy", "steps", "--save_steps", "1"]
# What it takes, under which limit of MiB, what the message names, and what takes less.
FULL = {
    "Stage I": (
        ["train-sae", *STAGE, *SAES, "--num_latents", "400000", "--per_device_train_batch_size", "32"], 3500,
        ("Out of memory at step 1", "num_latents: 200000 (now 400000)", "per_device_train_batch_size: 16 (now 32)",
         "Predicted memory", "saes 3.0"), ["--num_latents", "64"],
    ),
    "Stage I, making SAEs": (
        ["train-sae", *STAGE, *SAES, "--num_latents", "2000000"], 6000,
        ("Out of memory: ", "fewer num_latents", "Stage I: ", "saes 15."), ["--num_latents", "64"],
    ),
    "Stage II": (
        ["tune", *STAGE, "--kl_weight", "0", "--sft_weight", "1", "--per_device_train_batch_size", "4000",
         "--limit", "3000",
         "--max_length", "512"], 3500,
        ("Out of memory at step 1", "per_device_train_batch_size: 2000 (now 4000)", "Predicted memory",
         " + activations ", " + loss and backward ", " + adapter "),
        ["--per_device_train_batch_size", "4"],
    ),
    "evaluation": (
        ["evaluate", "--samples", "200", "--batch_size", "8000", "--temperature", "1.0", "--top_p", "1.0",
         "--dtype", "float32"], 2600,
        ("Out of memory while answering", "batch_size: 4000 (now 8000)", " + cache "),
        ["--batch_size", "50", "--max_problems", "2", "--samples", "2"],
    ),
    "loading a model": (
        ["evaluate", "--samples", "1", "--temperature", "1.0", "--top_p", "1.0"], 2500,
        ("Out of memory: ", "load_in_4bit: true", "Predicted memory", "model 0.38"), ["--max_problems", "2"],
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("where", FULL)
def test_memory_that_is_full_is_told_in_one_message_with_what_takes_less(tmp_path, where, fault):
    words, limit, told, change = FULL[where]
    model = "resa_hf/tiny/base"
    if where == "loading a model":
        big = AutoModelForCausalLM.from_pretrained(tiny_path("base")).config
        big.update({"intermediate_size": 65536})
        model = str(tmp_path / "big")
        AutoModelForCausalLM.from_config(big, dtype=torch.float32).save_pretrained(model)
        copy_tokenizer(tmp_path / "big")
    if words[0] == "evaluate":
        problems = tmp_path / "p.jsonl"
        problems.write_text("".join(json.dumps(row) + "\n" for row in make_rows(40, seed=7)))
        words = [*words, "--tasks", str(problems), "--file_prompt", "plain", "--max_new_tokens", "64"]
    start = [sys.executable, "-m", "resa_hf.cli", *words, "--model_name_or_path", model]

    def run(limit, folder, *more):
        line = f'ulimit -v {limit * 1024}; exec "$@"'
        place = ["--output_dir", str(tmp_path / folder)]
        return subprocess.run(["bash", "-c", line, "x", *start, *place, *more], capture_output=True, text=True)

    done = run(limit, "out")
    message = done.stderr[done.stderr.rfind("\nresa-hf ") :]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert all(part in message for part in told), message
    again = run(16_000 if words[0] == "evaluate" else limit, "less", *change)
    assert again.returncode == 0, again.stderr[-2000:]
    fault(f"out of memory (ulimit -v), {where}", told=message.strip(), kept="the folder; with what takes less it ends")
