"""Our adapter against lm-eval's own HFLM on the same weights: the same numbers, flags and texts, request by request."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from models import initialized
from tokenizers import Tokenizer as TokenizerFile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_mult.config import RunConfig
from lit_mult.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from lit_mult.errors import UserError
from lit_mult.evaluation.adapter import LitMultLM
from lit_mult.hf.folder import hf_weights
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged

MAX_LENGTH = 32
TEXT = "".join(f"{a} plus {b} is {a + b}, naïve café № {a}.\n" for a in range(12) for b in range(12))


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.train_bpe([TEXT], 300)


@pytest.fixture(scope="module")
def model(tokenizer: HuggingFaceTokenizer) -> Llama:
    """A model that has learned something of TEXT in a few dozen steps, so that its predictions differ by place."""
    shape = {"d_model": 32, "n_layers": 2, "head_dim": 8, "num_key_value_groups": 2}
    config = RunConfig.from_dict({"model": shape, "multipliers": "vector", "parametrization": {"base_d_model": 32}})
    model = initialized(config, tokenizer.vocab_size)
    documents = TEXT.splitlines(keepends=True)
    stream = [
        token for text in tokenizer.encode_batch(documents * 4) for token in [*text.tolist(), tokenizer.separator_id]
    ]
    windows = torch.tensor(stream[: len(stream) // 41 * 41]).view(-1, 41)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = windows[torch.randint(len(windows), (16,), generator=torch.Generator().manual_seed(step))]
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture
def ours(model: Llama, tokenizer: HuggingFaceTokenizer) -> Callable[..., LitMultLM]:
    settings = {"max_length": MAX_LENGTH, "device": "cpu", "batch_size": 4, "progress": False}
    return partial(LitMultLM, model=model, tokenizer=tokenizer, **settings)


@pytest.fixture(scope="module")
def theirs(model: Llama, tokenizer: HuggingFaceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    plain = merged(model)
    attention = plain.layers[0].self_attn
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=plain.norm.weight.numel(),
        intermediate_size=plain.layers[0].mlp.gate_proj.weight.shape[0],
        num_hidden_layers=len(plain.layers),
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        rms_norm_eps=plain.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": plain.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.separator_id,
        eos_token_id=tokenizer.separator_id,
    )
    twin = LlamaForCausalLM(config)
    twin.load_state_dict(hf_weights(plain))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=TokenizerFile.from_file(str(path)), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    return HFLM(pretrained=twin.eval(), tokenizer=fast, max_length=MAX_LENGTH, batch_size=4, device="cpu")


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index, metadata=("task", index, 1))
        for index, one in enumerate(arguments)
    ]


PAIRS = [
    ("3 plus 4 is", " 7"),  # choices of an item, of one token and of more
    ("3 plus 4 is", " 8"),
    ("3 plus 4 is", " 11, naïve café"),
    ("3 plus 4 is", " 11, naïve"),
    ("3 plus 4 is", " twelve"),
    ("9 plus 9 is ", "18"),  # the space belongs to the continuation
    ("", "7 plus 7 is 14"),
    ("", "7"),
    ("", "7 plus"),
    ("Ünïcödé 🎲 №", " 7 日本"),
    ("3 plus 4 is", " 7"),  # again
    ("3 plus 4 is 7,", " naïve café"),
    ("3 plus 4", " is 7"),  # reads what the first reads, and scores more of it
    (TEXT[:400], " 2 plus 3 is"),  # longer than max_length
    (TEXT[:400], " 2 plus 3 was"),
    (TEXT[:400], " 7"),
    (TEXT[:400], " 8"),
    (TEXT[:150], "4 plus 5 is 9, naïve café № 4."),
]


def test_log_likelihoods_are_those_of_hflm(ours: Callable[..., LitMultLM], theirs: HFLM) -> None:
    # HFLM's cache of logits gives a request the first logits of another that scores more of the same tokens.
    wanted = [theirs.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in PAIRS]
    for batch_size in (1, 4, 64):
        lm = ours(batch_size=batch_size)
        got = lm.loglikelihood(instances("loglikelihood", PAIRS))
        assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
        assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-4)
        assert lm.truncated == 5
    assert {greedy for _, greedy in wanted} == {True, False}
    assert max(value for value, _ in wanted) > -1 > -10 > min(value for value, _ in wanted)


def test_log_likelihoods_of_windows_are_those_of_hflm(ours: Callable[..., LitMultLM], theirs: HFLM) -> None:
    texts = [("",), ("7",), ("4 plus 4 is 8",), (TEXT[:300],), (TEXT[:1000] + "🎲",), (TEXT[:300],)]
    lm = ours()
    got = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    wanted = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(wanted, abs=1e-3)
    assert len(lm.tok_encode(TEXT[:300])) > 2 * MAX_LENGTH
    assert lm.truncated == 0


PROMPTS = [
    ("3 plus 4 is", {"until": ["."], "max_gen_toks": 20}),
    ("3 plus 4 is", {"until": ["\n"], "max_gen_toks": 20}),
    ("3 plus 4 is", {"until": [" caf"], "max_gen_toks": 20}),  # ends within a word
    ("3 plus 4 is", {"until": "na", "max_gen_toks": 20}),
    ("3 plus 4 is", {"until": [], "max_gen_toks": 24}),  # the separator ends it
    ("3 plus 4 is", {"until": ["."], "max_gen_toks": 20}),  # again
    ("3", {"until": ["Question:", "ï", "№"], "max_gen_toks": 25, "do_sample": False, "temperature": 0.0}),
    ("8 plus", {"until": ["\n\n"], "max_gen_toks": 1}),
    ("8 plus", {"until": ["\n\n"], "max_new_tokens": 3}),
    (TEXT[:400], {"until": ["\n"], "max_gen_toks": 12}),  # longer than max_length
    ("11 plus 7 is 18, naïve", {"until": ["<|endoftext|>"], "max_gen_toks": 4}),
    ("日本 is", {"until": ["zzz"], "max_gen_toks": 20, "top_p": 0.9}),
    ("0 plus 0 is 0, naïve caf", {"until": ["zzz"], "max_gen_toks": 1}),  # half a character may be the last
]


def test_continuations_are_those_of_hflm(ours: Callable[..., LitMultLM], theirs: HFLM) -> None:
    wanted = [theirs.generate_until(instances("generate_until", [one]), disable_tqdm=True)[0] for one in PROMPTS]
    for batch_size in (1, 4, 64):
        lm = ours(batch_size=batch_size)
        assert lm.generate_until(instances("generate_until", PROMPTS)) == wanted
        assert lm.truncated == 1
    assert wanted[4].endswith("\n"), "the model should have learned where a document ends"
    assert wanted[1].startswith(wanted[0])
    assert len(set(wanted)) > 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "asks for sampling"),
        ({"temperature": 0.7}, "asks for sampling"),
        ({"num_beams": 4}, "num_beams = 4"),
        ({"max_gen_toks": MAX_LENGTH}, "give a larger --max_length"),
    ],
)
def test_what_greedy_decoding_cannot_do_is_refused(
    ours: Callable[..., LitMultLM], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ours().generate_until(instances("generate_until", [("3", {"until": ["."], "max_gen_toks": 4} | arguments)]))


@pytest.mark.parametrize(
    ("pair", "message"), [(("3 plus", ""), "no tokens"), (("3", TEXT), "give a larger --max_length")]
)
def test_continuations_that_cannot_be_scored_are_refused(
    ours: Callable[..., LitMultLM], pair: tuple[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ours().loglikelihood(instances("loglikelihood", [pair]))


def test_an_empty_prompt_is_continued_like_the_start_of_a_document(ours: Callable[..., LitMultLM]) -> None:
    lm = ours()
    (text,) = lm.generate_until(instances("generate_until", [("", {"until": ["\n"], "max_gen_toks": 8})]))
    assert text == lm.tokenizer.decode(lm.tok_encode(text))
    ((_, greedy),) = lm.loglikelihood(instances("loglikelihood", [("", text)]))
    assert text
    assert greedy


def test_no_request_is_evaluated_twice(ours: Callable[..., LitMultLM], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ours(batch_size=64)
    read: list[int] = []
    hidden = Llama.hidden
    monkeypatch.setattr(
        Llama, "hidden", lambda self, ids, cache=None: read.append(ids.numel()) or hidden(self, ids, cache)
    )
    question = "3 plus 4 is 7, 3 plus 5 is"
    length = len(lm.tok_encode(question))
    digits = [(question, f" {digit}") for digit in (1, 2, 3, 1)]
    lm.loglikelihood(instances("loglikelihood", digits))
    assert read == [length]
    read.clear()
    rests = [" 1 plus 1 is", " 2 plus 2 is", " 3 plus 3 is"]
    lm.loglikelihood(instances("loglikelihood", [(question, rest) for rest in rests]))
    assert read == [length, sum(len(lm.tok_encode(rest)) - 1 for rest in rests)]
    read.clear()
    lm.generate_until(instances("generate_until", [(question, {"until": ["."], "max_gen_toks": 2})] * 3))
    assert read == [length, 1]


class Hook:
    """Stands for lm-eval's cache of answers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.seen.append((kind, request, answer))


def test_every_answer_is_given_to_the_cache_of_lm_eval(ours: Callable[..., LitMultLM]) -> None:
    lm, hook = ours(), Hook()
    lm.set_cache_hook(hook)
    asked = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [("4 plus 4",), (TEXT[:300],)],
        "generate_until": [("3", {"until": ["."], "max_gen_toks": 4}), ("4", {"until": ["."], "max_gen_toks": 4})],
    }
    for kind, arguments in asked.items():
        hook.seen.clear()
        answers = getattr(lm, kind)(instances(kind, arguments))
        wanted = [(kind, request, answer) for request, answer in zip(arguments, answers, strict=True)]
        assert sorted(map(repr, hook.seen)) == sorted(map(repr, wanted))


def test_stop_strings_of_several_bytes_end_a_text_of_bytes() -> None:
    config = RunConfig.from_dict({"model": {"d_model": 32, "n_layers": 1}})
    model = initialized(config, 256)
    answer = "aé№!\0".encode()
    with torch.no_grad():  # sees nothing but the last byte, and goes on to the next one of the answer
        for block in model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        unit = model.embed_tokens.weight / model.embed_tokens.weight.norm(dim=1, keepdim=True)
        model.lm_head.weight.zero_()
        for before, after in zip(b">" + answer, answer, strict=False):
            model.lm_head.weight[after] = unit[before]
    lm = LitMultLM(model, ByteTokenizer(), max_length=64, device="cpu", batch_size=2, progress=False)
    texts = lm.generate_until(
        instances(
            "generate_until",
            [
                ("x>", {"until": until, "max_gen_toks": most})
                for until, most in ((["№"], 9), (["zz"], 9), (["é№"], 9), (["!"], 4), (["!", "é"], 9))
            ],
        )
    )
    assert texts == ["aé", "aé№!", "a", "aé\N{REPLACEMENT CHARACTER}", "a"]


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [","], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{answer}}, naïve café",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of small sums, with their data, as lm-eval reads them."""
    folder = tmp_path_factory.mktemp("tasks")
    items = [
        {
            "question": f"{a} plus {b} is",
            "answer": f" {a + b}",
            "choices": [f" {a + b + off}" for off in (0, 1, 13, -2)],
            "gold": 0,
        }
        for a, b in [(1, 2), (3, 9), (7, 7), (10, 4), (11, 11), (5, 0)]
    ]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, task in TASKS.items():
        source = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(source | {"test_split": "test"} | task))
    return folder


def test_whole_evaluations_agree_item_by_item(
    ours: Callable[..., LitMultLM], theirs: HFLM, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluate(lm: Any) -> dict[str, Any]:
        found: dict[str, Any] = simple_evaluate(
            model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, num_fewshot=1, verbosity="ERROR"
        )
        return found

    got, wanted = evaluate(ours()), evaluate(theirs)
    for name in TASKS:
        assert len(got["samples"][name]) == 6
        for mine, other in zip(got["samples"][name], wanted["samples"][name], strict=True):
            assert mine["doc_hash"] == other["doc_hash"]
            _same(mine["filtered_resps"], other["filtered_resps"])
        for metric, value in wanted["results"][name].items():
            if isinstance(value, float):
                assert got["results"][name][metric] == pytest.approx(value, rel=1e-4)


def _same(mine: Any, other: Any) -> None:
    if isinstance(other, list | tuple):
        for one, two in zip(mine, other, strict=True):
            _same(one, two)
    elif isinstance(other, float):
        assert mine == pytest.approx(other, abs=1e-3)
    else:
        assert mine == other
