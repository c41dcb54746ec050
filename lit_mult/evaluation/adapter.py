"""A live model for lm-eval, with the results of lm-eval's `HFLM` for the exported model.

It differs from `HFLM` only where that fails or is wrong: the separator replaces not only an empty context but also a
blank one, and an empty prompt; requests with the same tokens but different numbers of scored tokens are scored
separately. Decoding is greedy; tasks that need another method are refused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lit_mult.data.tokenizers import Tokenizer
from lit_mult.errors import UserError
from lit_mult.evaluation.generation import Prompt, continue_greedily
from lit_mult.evaluation.scoring import Pair, Score, log_likelihoods
from lit_mult.nn.llama import Llama
from lit_mult.nn.merging import merged

# Greedy decoding ignores these.
_SAMPLING_ONLY = {"top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "use_cache": True}


class LitMultLM(TemplateLM):  # type: ignore[misc] # lm-eval is not typed
    """Scores and continues texts with a live model.

    Token ids are those of training: no special token is added to a text, and none is recognized in it.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        max_length: int,
        device: torch.device | str,
        batch_size: int,
        progress: bool = True,
    ) -> None:
        """Copy the model with its multipliers merged; later changes to the model have no effect.

        `max_length` is the context length in tokens (longer texts lose their beginning), `batch_size` the number of
        sequences in a forward.
        """
        super().__init__()
        self._device = torch.device(device)
        self.model = merged(model).to(self._device)
        self.model.join_weights()
        self.tokenizer = tokenizer
        self.max_length, self.batch_size, self.progress = max_length, batch_size, progress
        self.max_gen_toks = 256
        """Tokens to generate if a task does not specify them; as in `HFLM`."""
        self.truncated = 0
        """Requests so far that were longer than max_length and lost their beginning."""
        # The choices of an item are consecutive requests with the same context.
        self._encode = lru_cache(maxsize=64)(lambda text: self.tokenizer.encode(text).tolist())

    @property
    def eot_token_id(self) -> int:
        """The separator ends texts and precedes them."""
        return self.tokenizer.separator_id

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-eval's request caches."""
        return self.tokenizer.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Token ids of a text; special tokens are never added."""
        ids: list[int] = self._encode(string)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Log-likelihood of a continuation after a context, and whether greedy decoding would give it.

        Raises:
            UserError: a continuation has no tokens, or more than max_length.
        """
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=self._silent(disable_tqdm))
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[Score]:
        pairs: list[Pair] = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise UserError(f"the continuation {text!r} has no tokens")
            if len(continuation) > self.max_length:
                excess = f"{len(continuation)} tokens, more than the context length {self.max_length}"
                raise UserError(f"a continuation has {excess}; give a larger --max_length")
            fitting = self.max_length + 1 - len(continuation)  # the last token is predicted, never read
            self.truncated += len(context) > fitting
            pairs.append((context[-fitting:] or [self.prefix_token_id], continuation))
        scores = self._score(pairs, "Running loglikelihood requests", disable_tqdm)
        for (strings, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts after a separator, in windows of max_length that share one token."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs += map(make_disjoint_window, windows)
            owners += [owner] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        scores = self._score(pairs, "Running loglikelihood_rolling windows", disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first of the strings in `until` or the separator.

        Raises:
            UserError: a request needs another decoding method, or max_length or more new tokens, which leaves no room
                for its prompt.
        """
        by_prompt: dict[Prompt, list[int]] = {}
        for index, request in enumerate(requests):
            by_prompt.setdefault(self._prompt(*request.args), []).append(index)
        prompts = list(by_prompt)
        answers = [""] * len(requests)
        with self._bar(len(requests), "Running generate_until requests", disable_tqdm) as bar:

            def done(number: int, text: str) -> None:
                cut: str = postprocess_generated_text(text, stop=list(prompts[number].until), think_end_token=None)
                for index in by_prompt[prompts[number]]:
                    answers[index] = cut
                    self.cache_hook.add_partial("generate_until", requests[index].args, cut)
                    bar.update()

            continue_greedily(self.model, self.tokenizer, prompts, self.batch_size, done)
        return answers

    def _prompt(self, context: str, generation: dict[str, Any]) -> Prompt:
        arguments = dict(normalize_gen_kwargs(generation, self.max_gen_toks))
        until = handle_stop_sequences(arguments.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        max_tokens = arguments.pop("max_gen_toks")
        if arguments.pop("do_sample"):
            raise UserError("a task asks for sampling (do_sample, or a temperature); only greedy decoding is supported")
        arguments.pop("temperature", None)
        for name, value in arguments.items():
            if name not in _SAMPLING_ONLY and (name, value) not in _NEUTRAL.items():
                raise UserError(f"a task asks for {name} = {value!r} in generation; only greedy decoding is supported")
        if not 0 < max_tokens < self.max_length:
            asked = f"{max_tokens} tokens with a context length of {self.max_length}"
            raise UserError(f"a task asks to generate {asked}; give a larger --max_length, so that prompts fit")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(ids) > self.max_length - max_tokens
        return Prompt(tuple(ids[max_tokens - self.max_length :]), tuple(filter(None, until)), max_tokens)

    def _score(self, pairs: list[Pair], title: str, disable_tqdm: bool) -> list[Score]:
        with self._bar(len(pairs), title, disable_tqdm) as bar:
            return log_likelihoods(self.model, pairs, self.batch_size, bar.update)

    def _bar(self, total: int, title: str, disable_tqdm: bool) -> Any:
        return tqdm(total=total, desc=title, disable=self._silent(disable_tqdm))

    def _silent(self, disable_tqdm: bool) -> bool:
        return disable_tqdm or not self.progress
