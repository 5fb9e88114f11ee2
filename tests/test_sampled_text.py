"""Arms that are trained on what models write, and on fewer rows."""

import json
import re

import datasets
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_sweep import recipe, write
from test_text import R1, make_tokenizer

from resa_hf.arguments import DataArguments
from resa_hf.cli import main
from resa_hf.commands.recipe import parse_settings
from resa_hf.commands.single_stage import stage_text
from resa_hf.errors import DataError
from resa_hf.experiment import sampled_text
from resa_hf.experiment.arms import Arm, Candidate, make_arms, run_recipe
from resa_hf.experiment.folder import RunFolder
from resa_hf.experiment.pipeline import free_sections, prepare_run
from resa_hf.experiment.report import as_plain
from resa_hf.experiment.sampled_text import sample_text
from resa_hf.experiment.schedule import text_jobs
from resa_hf.experiment.stages import tune
from resa_hf.text import encode_prompt, evaluation_prompt
from resa_hf.tiny import load_tiny_base, load_tiny_source, load_tiny_tokenizer
from resa_hf.tiny.task import answer_of
from resa_hf.tuning.config import SAETuningConfig
from resa_hf.tuning.on_policy import OnPolicyTrainer, on_policy_config, on_policy_prompts

SFT_TUNING = {"kl_weight": 0.0, "sft_weight": 1.0}
SFT = {"sae_from": "none"} | SFT_TUNING
TEACHER = {"sae_from": "none", "kl_reference": "source"}
ARMS = {
    "CoT-free SFT": SFT,
    "SFT on traces": SFT | {"text": "source"},
    "KL on the target's": TEACHER | {"text": "target"},
    "on-policy": TEACHER | {"text": "student"},
}
STAGE2 = {"learning_rate": 1e-3, "max_length": 96, "per_device_train_batch_size": 8, "max_steps": 3}
STAGE1 = {"hookpoints": ["layers.2"], "num_latents": 64, "max_length": 96, "max_steps": 1}


def settings_of(tmp_path, tokens=33, **changes):
    # 33 new tokens: the end token of an answer to a chain of 5 steps is the 34th.
    sampling = {"temperature": 1.0, "max_new_tokens": tokens, "batch_size": 8}
    parts = {"arms": ARMS, "stage1": STAGE1, "stage2": STAGE2, "sampling": sampling, "lora_alpha": 4}
    content = recipe(tmp_path / "run", **parts | changes)
    return parse_settings(content, [], "test", "test", "recipe")


def answered(place):
    """The completions as the engine has kept them, in the order of the questions."""
    batches = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()[1:]]
    found = {problem: kept for batch in batches for problem, _, kept in batch["completions"]}
    return [found[problem] for problem in sorted(found)]


def documents(place, tokenizer):
    return tokenizer.batch_decode(datasets.load_from_disk(place / "tokens")["input_ids"][:])


def training_documents(folder, tokenizer):
    return tokenizer.batch_decode(datasets.load_from_disk(folder.data("train"))["input_ids"][:])


@pytest.mark.parametrize("text", ["source", "target"])
def test_right_and_whole_answers_are_kept_of_the_source_and_all_of_the_target(tmp_path, tiny_tokenizer, text):
    settings, folder = settings_of(tmp_path), RunFolder(tmp_path / "run")
    prepare_run(folder, settings)
    sample_text(folder, settings, text, 0)
    place = folder.text(text, 0)
    prompts = [row.partition("<think>")[0] for row in training_documents(folder, tiny_tokenizer)]
    expected, cut_but_right = [], 0
    for prompt, kept in zip(prompts, answered(place), strict=True):
        found = re.search(r"</think><answer>(\d)</answer>$", kept["text"])
        right = found is not None and found[1] == answer_of(re.search(r"User: (.*)\n", prompt)[1])
        cut_but_right += right and kept["truncated"]
        if text == "target" or (right and not kept["truncated"]):
            # What was cut has no end to be learned.
            expected.append(f"{prompt}<think>{kept['text']}{'' if kept['truncated'] else '<eos>'}")
    assert cut_but_right and documents(place, tiny_tokenizer) == expected
    told = json.loads((place / "text.json").read_text())
    assert (told["asked"], told["kept"]) == (52, len(expected)) and (len(expected) < 52) == (text == "source")
    assert told["tokens"] == sum(kept["length"] for kept in answered(place)) and told["seconds"] > 0


@pytest.mark.long
def test_a_seed_gives_the_same_text_again_and_another_seed_another(tmp_path):
    settings = settings_of(tmp_path, train_rows=16, seeds=[0, 1])
    assert [(job.text, job.seed) for job in text_jobs(settings)] == [
        (text, seed) for seed in (0, 1) for text in ("source", "target")
    ]
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    for folder, seed in ((one, 0), (one, 1), (two, 0)):
        sample_text(folder, settings, "target", seed)
    first, other, again = (answered(f.text("target", s)) for f, s in ((one, 0), (one, 1), (two, 0)))
    assert len(first) == 16 and first == again and first != other


def test_an_interrupted_sampling_goes_on_and_a_finished_one_is_left_alone(tmp_path, monkeypatch):
    settings, folder = settings_of(tmp_path, train_rows=24), RunFolder(tmp_path / "run")
    sample_text(folder, settings, "source", 0)
    place = folder.text("source", 0)
    whole = (place / "answers.jsonl").read_text()
    rows = datasets.load_from_disk(place / "tokens")["input_ids"][:]
    head = "".join(whole.splitlines(keepends=True)[:2])
    (place / "answers.jsonl").write_text(head)
    (place / "text.json").unlink()
    sample_text(folder, settings, "source", 0)
    resumed = (place / "answers.jsonl").read_text()
    assert resumed.startswith(head) and resumed.count("\n") == whole.count("\n") == 4
    assert datasets.load_from_disk(place / "tokens")["input_ids"][:] == rows
    monkeypatch.setattr(sampled_text, "TransformersEngine", None)
    sample_text(folder, settings, "source", 0)
    # Text that was sampled must not pass for text of other sampling settings; arms may still be mended.
    assert free_sections(folder) == ("stage2", "arms") and "sampling" in free_sections(RunFolder(tmp_path / "new"))


def test_train_rows_leaves_the_questions_alone_and_takes_the_first_rows(tmp_path, tiny_tokenizer):
    read = {}
    for rows in (None, 10, 1000):
        settings, folder = settings_of(tmp_path, train_rows=rows, selection=6), RunFolder(tmp_path / str(rows))
        told = prepare_run(folder, settings)
        questions = json.loads(folder.data("questions.json").read_text())
        texts = training_documents(folder, tiny_tokenizer)
        assert len(texts) == told["train_rows"]
        read[rows] = questions, texts
    assert read[10][0] == read[None][0] and [len(part) for part in read[10][0].values()] == [8, 6]
    assert read[10][1] == read[None][1][:10] and read[1000] == read[None] and len(read[None][1]) == 60 - 8 - 6
    data = DataArguments(dataset="tiny-reasoner", limit=60, held_out=8, template="chat", pack=False, train_rows=10)
    train, held_out, _ = stage_text(data, tiny_tokenizer, 96)
    assert (len(train), len(held_out)) == (10, 8)


def naive_kl(student, teacher, rows):
    """Mean KL(teacher || student) over all positions with a next token, from full logits in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in rows:
            p, q = (model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for model in (teacher, student))
            total, count = total + (p.exp() * (p - q)).sum().item(), count + len(p)
    return total / count


def test_on_policy_lowers_the_kl_to_the_source_and_leaves_a_plain_adapter(tmp_path):
    stage2 = STAGE2 | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings, folder = settings_of(tmp_path, stage2=stage2, train_rows=8, tokens=1), RunFolder(tmp_path / "run")
    prepare_run(folder, settings)
    arm = settings.arms[-1]
    tune(folder, settings, arm, Candidate(1e-3), 0)
    place = folder.training(arm, Candidate(1e-3), 0)
    tuning = json.loads((place / "tuning.json").read_text())
    held_out = datasets.load_from_disk(folder.data("held_out"))["input_ids"][:]
    tuned = PeftModel.from_pretrained(load_tiny_base(), place / "adapter").eval()
    before, after = (naive_kl(model, load_tiny_source(), held_out) for model in (load_tiny_base(), tuned))
    first, last = tuning["evaluations"]
    assert (first["eval_kl"], last["eval_kl"]) == (pytest.approx(before, rel=1e-4), pytest.approx(after, rel=1e-4))
    assert after < 0.95 * before and (first["step"], last["step"], tuning["steps"]) == (0, 3, 3)
    # Each of the three steps reads all eight prompts, and one new token of each.
    documents = training_documents(folder, load_tiny_tokenizer())
    prompts = [document.partition("<think>")[0] + "<think>" for document in documents]
    assert tuning["tokens"] == 3 * sum(len(load_tiny_tokenizer()(prompt)["input_ids"]) + 1 for prompt in prompts)
    assert {"source", "source_adapter", "base"} <= tuning["revisions"].keys()


@pytest.mark.long
def test_on_policy_resumes_to_the_same_adapter_bit_for_bit(tmp_path, monkeypatch):
    stage2 = STAGE2 | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    settings = settings_of(tmp_path, stage2=stage2, train_rows=32)
    whole, parts, arm = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts"), settings.arms[-1]
    for folder in (whole, parts):
        prepare_run(folder, settings)
    tune(whole, settings, arm, Candidate(1e-3), 0)
    step = OnPolicyTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(OnPolicyTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(parts, settings, arm, Candidate(1e-3), 0)
    assert (parts.training(arm, Candidate(1e-3), 0) / "run" / "checkpoint-2").is_dir()
    tune(parts, settings, arm, Candidate(1e-3), 0)
    places = [folder.training(arm, Candidate(1e-3), 0) for folder in (whole, parts)]
    one, two = (load_file(place / "adapter" / "adapter_model.safetensors") for place in places)
    assert all(torch.equal(weight, two[name]) for name, weight in one.items()) and one.keys() == two.keys()
    assert any(weight.abs().sum() > 0 for name, weight in one.items() if "lora_B" in name)
    tokens = [json.loads((place / "tuning.json").read_text())["tokens"] for place in places]
    assert tokens[0] == tokens[1] > 0


def test_on_policy_trains_with_the_settings_of_stage_2():
    given = {
        "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 7, "weight_decay": 0.1,
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "seed": 11,
        "optim": "adafactor", "adam_beta2": 0.9, "logging_steps": 4,
    }  # fmt: skip
    args = SAETuningConfig(
        output_dir="out", report_to="none", kl_reference="source", kl_beta=0.25, kl_temperature=0.7, **given
    )
    config = on_policy_config(args, top_p=0.9, max_new_tokens=21)
    assert {name: getattr(config, name) for name in given} == given
    assert (config.beta, config.temperature, config.top_p, config.max_completion_length) == (0.25, 0.7, 0.9, 21)
    assert (config.use_vllm, config.gradient_checkpointing, config.bf16) == (False, False, args.bf16)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_on_policy_prompts_have_one_bos_at_most(adds_bos):
    for template, chat_template in (("chat", R1), ("paper", None)):
        tokenizer = make_tokenizer(adds_bos=adds_bos, chat_template=chat_template)
        prompt = evaluation_prompt("1+1?", template=template, tokenizer=tokenizer)
        args = SAETuningConfig(output_dir="out", kl_reference="source", per_device_train_batch_size=2)
        rows = on_policy_prompts([prompt] * 2, tokenizer, args)
        read = tokenizer(rows["prompt"][:])["input_ids"]  # as TRL does
        assert read == [encode_prompt(prompt, tokenizer)] * 2
        assert read[0].count(tokenizer.bos_token_id) == (adds_bos or template == "chat")
        with pytest.raises(DataError, match="1 training questions do not fill one batch of 2"):
            on_policy_prompts([prompt], tokenizer, args)


def test_text_is_part_of_what_makes_a_control():
    tuned, other = Arm("a", "source", text="target"), Arm("b", "source")
    noise = Arm("n", "source", tuning={"control": "noise"}, text="target")
    assert noise.is_control_of(tuned) and not noise.is_control_of(other)
    sft, traces = (
        Arm(name, "none", tuning=SFT_TUNING, text=text) for name, text in (("s", "dataset"), ("t", "source"))
    )
    assert sft.is_control and sft.is_control_of(tuned) and sft.is_control_of(traces)
    assert not traces.is_control and not traces.is_control_of(tuned)


def test_the_text_of_an_arm_survives_the_report(tmp_path):
    settings = settings_of(tmp_path, arms=ARMS | {"zero": {"known": "zero_adapter"}})
    plain = json.loads(json.dumps(as_plain(settings)))
    assert [entry.get("text") for entry in plain["arms"]] == [None, "source", "target", "student", None]
    again = run_recipe(plain)
    assert again["arms"]["on-policy"] == {"sae_from": "none", "text": "student", "kl_reference": "source"}
    assert make_arms(again["arms"], False, True) == settings.arms


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        (SFT | {"text": "teacher"}, {}, r"text is 'teacher' \(valid: dataset, source, target, student\)"),
        ({"known": "zero_adapter", "text": "source"}, {}, "'a' cannot set text: it is not trained"),
        ({"adapter": "mine", "text": "dataset"}, {}, "'a' cannot set text: it is not trained"),
        (SFT | {"text": "source"}, {"source_model": None}, "'a': text: source needs a source model"),
        (TEACHER | {"text": "student"}, {"source_model": None}, "'a': text: student needs a source model"),
        ({"text": "student"}, {}, "'a': text: student needs .* kl_reference is base, there is an SAE"),
        ({"text": "student", "kl_reference": "source"}, {}, "but there is an SAE"),
        (SFT | {"text": "student"}, {}, "kl_reference is base, kl_weight is 0.0, sft_weight is 1.0"),
        (TEACHER | {"text": "student", "kl_weight": 2.0}, {}, "kl_weight is 2.0"),
        (TEACHER | {"text": "student", "kl_temperature": 2.0}, {}, "temperature is 1.0 and kl_temperature 2.0"),
        (SFT, {"train_rows": 0}, "train_rows is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, arm, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, arms={"a": arm}, **changes)


def test_too_little_text_is_an_error_that_says_so(tmp_path):
    folder = RunFolder(tmp_path / "run")
    short = settings_of(tmp_path, train_rows=5, tokens=2)
    with pytest.raises(DataError, match="Of 5 training questions the source answered none rightly within 2 tokens"):
        sample_text(folder, short, "source", 0)
    packed = settings_of(tmp_path, train_rows=1, tokens=2, pack=True)
    with pytest.raises(DataError, match="1 documents of .* tokens do not fill one chunk of 96"):
        sample_text(folder, packed, "target", 0)


@pytest.mark.slow
def test_compare_with_every_kind_of_text_and_once_more_after_a_failure(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    sampling = {"temperature": 1.0, "max_new_tokens": 64, "batch_size": 8}
    changes = {"stage2": STAGE2, "stage1": STAGE1, "sampling": sampling, "arms": ARMS, "seeds": [0, 1], "limit": 50}
    path = write(tmp_path / "recipe.yaml", recipe(folder, **changes, train_rows=24))
    with monkeypatch.context() as patched:
        patched.setattr(OnPolicyTrainer, "train", lambda self, **_: (_ for _ in ()).throw(ValueError("no power")))
        assert main(["compare", "--config", str(path)]) == 2
    assert "on-policy, seed 0: no power" in capsys.readouterr().err
    sampled = {place: place.read_text() for place in folder.glob("text/*/*/*.json*")}
    assert len(sampled) == 2 * 2 * 2
    assert main(["compare", "--config", str(path)]) == 0
    assert {place: place.read_text() for place in folder.glob("text/*/*/*.json*")} == sampled

    report = json.loads((folder / "report.json").read_text())
    told = {text: [json.loads((RunFolder(folder).text(text, s) / "text.json").read_text()) for s in (0, 1)]
            for text in ("source", "target")}  # fmt: skip
    for text, seeds in told.items():
        assert report["sampled_text"][text]["kept"] == sum(seed["kept"] for seed in seeds)
        assert report["sampled_text"][text]["asked"] == 48
    kept = report["sampled_text"]["source"]["kept"]
    line = f"Text sampled from the source: 48 questions asked, {kept} kept (right and not truncated)"
    assert line in (folder / "report.md").read_text() and "| sampled text" in (folder / "report.md").read_text()
    seconds = sum(seed["seconds"] for seeds in told.values() for seed in seeds)
    assert report["costs"]["sampled text"]["seconds"] == pytest.approx(seconds)
    arms = {arm["name"]: arm for arm in report["arms"]}
    for name, text in (("SFT on traces", "source"), ("KL on the target's", "target")):
        slug = Arm(name).slug
        for seed in (0, 1):
            tuning = json.loads((folder / "arms" / slug / "1e-03" / f"seed-{seed}" / "tuning.json").read_text())
            assert tuning["text"] == told[text][seed]
            expected = tuning["seconds"] + told[text][seed]["seconds"]
            assert arms[name]["training_seconds"][seed] == pytest.approx(expected)
    assert set(arms["SFT on traces"]["controls"]) == {"CoT-free SFT"}
