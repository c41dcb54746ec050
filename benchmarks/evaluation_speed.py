"""Requests/s of our lm-eval model against lm-eval's own HFLM: same weights, requests, batch size and threads, one run.

    python benchmarks/evaluation_speed.py [--widths 64 128 256] [--rounds 5] [--json speed.json]

The two take turns, so that a machine whose speed drifts treats both alike; the ratio is taken within a round and the
median over rounds is reported.

- choices: log-likelihoods of the 4 choices of an item, a choice of some ten tokens after a context of about a hundred
- letters: the same contexts, choices of one token each
- texts: log-likelihoods of whole texts in windows (perplexity)
- continuations: greedy, 32 tokens after the same contexts
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer as TokenizerFile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_mult.config import RunConfig
from lit_mult.data.tokenizers import HuggingFaceTokenizer
from lit_mult.evaluation.adapter import LitMultLM
from lit_mult.hf.folder import hf_weights
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged

LAYERS, VOCABULARY, MAX_LENGTH, BATCH, ITEMS = 4, 1024, 256, 16, 64


def requests() -> dict[str, list[Instance]]:
    """Requests of every kind, from the text of Python's standard library."""
    lines = Path(argparse.__file__).read_text().splitlines()
    contexts = ["\n".join(lines[9 * item : 9 * item + 4 + item % 7]).strip() for item in range(ITEMS)]
    choices = [" ".join(lines[9 * item + 700 : 9 * item + 702]).strip()[:30] for item in range(4 * ITEMS)]
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "choices": [(contexts[item // 4], f" {choice}{item % 4}") for item, choice in enumerate(choices)],
        "letters": [(context, f" {letter}") for context in contexts for letter in "ABCD"],
        "texts": [("\n".join(lines[40 * item : 40 * item + 50]),) for item in range(ITEMS // 2)],
        "continuations": [(context, {"until": ["\n\n\n"], "max_gen_toks": 32}) for context in contexts],
    }
    kinds = dict.fromkeys(arguments, "loglikelihood")
    kinds |= {"texts": "loglikelihood_rolling", "continuations": "generate_until"}
    return {
        name: [Instance(kinds[name], {}, one, index, ("task", index, 1)) for index, one in enumerate(rows)]
        for name, rows in arguments.items()
    }


def hugging_face(model: Llama, tokenizer: HuggingFaceTokenizer) -> HFLM:
    """lm-eval's own model around the reference implementation with the same weights."""
    plain = merged(model)
    attention = plain.layers[0].self_attn
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=plain.norm.weight.numel(),
            intermediate_size=plain.layers[0].mlp.gate_proj.weight.shape[0],
            num_hidden_layers=len(plain.layers),
            num_attention_heads=attention.n_heads,
            num_key_value_heads=attention.n_kv_heads,
            rms_norm_eps=plain.norm.eps,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.separator_id,
            eos_token_id=tokenizer.separator_id,
            attn_implementation="sdpa",
        )
    )
    twin.load_state_dict(hf_weights(plain))
    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder, "tokenizer.json"))
        file = TokenizerFile.from_file(str(Path(folder, "tokenizer.json")))
    fast = PreTrainedTokenizerFast(tokenizer_object=file, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    return HFLM(pretrained=twin.eval(), tokenizer=fast, max_length=MAX_LENGTH, batch_size=BATCH, device="cpu")


def seconds(ask: Callable[..., Any], rows: list[Instance]) -> tuple[float, Any]:
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # bars that cannot be switched off
        answers = ask(rows, disable_tqdm=True)
    return time.perf_counter() - start, answers


def agree(ours: Any, theirs: Any) -> bool:
    """Whether two answers are the same, up to rounding."""
    if isinstance(theirs, tuple):
        return agree(ours[0], theirs[0]) and ours[1] == theirs[1]
    return ours == theirs if isinstance(theirs, str) else abs(ours - theirs) <= 1e-3 + 1e-5 * abs(theirs)


def measure(width: int, rounds: int) -> dict[str, dict[str, float]]:
    """Requests/s of both and their ratio, by kind of request."""
    config = RunConfig().with_overrides({"multipliers": "vector", "model.d_model": width, "model.n_layers": LAYERS})
    tokenizer = HuggingFaceTokenizer.train_bpe([Path(argparse.__file__).read_text()], VOCABULARY)
    plan = plan_run(config, tokenizer.vocab_size)
    model = Llama(config.model, plan)
    initialize(model, plan, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # predictions that differ by more than rounding
    rivals = {
        "ours": LitMultLM(model, tokenizer, MAX_LENGTH, "cpu", BATCH, progress=False),
        "hflm": hugging_face(model, tokenizer),
    }
    row = {}
    for name, rows in requests().items():
        took: dict[str, list[float]] = {rival: [] for rival in rivals}
        for number in range(rounds + 1):  # the first to warm up
            answers = {}
            for rival, lm in rivals.items():
                second, answers[rival] = seconds(getattr(lm, rows[0].request_type), rows)
                if number:
                    took[rival].append(second)
        assert all(agree(*pair) for pair in zip(answers["ours"], answers["hflm"], strict=True)), name
        ratio = statistics.median(other / own for own, other in zip(took["ours"], took["hflm"], strict=True))
        row[name] = {rival: len(rows) / statistics.median(times) for rival, times in took.items()} | {"ratio": ratio}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    print(f"{torch.get_num_threads()} threads, {LAYERS} layers, {VOCABULARY} tokens, batch {BATCH}, fp32; requests/s")
    print("| d | requests | HFLM | ours | ours / HFLM |\n|---|---|---|---|---|")
    results = {}
    for width in arguments.widths:
        results[width] = measure(width, arguments.rounds)
        for name, row in results[width].items():
            print(f"| {width} | {name} | {row['hflm']:,.0f} | {row['ours']:,.0f} | {row['ratio']:.2f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
