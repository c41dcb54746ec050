"""The decoder against Hugging Face's Llama, and what it must hold on its own.

Shapes in names: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import initialized
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lit_mult.config import RunConfig
from lit_mult.method.plan import plan_run
from lit_mult.nn.init import initialize
from lit_mult.nn.llama import Llama
from lit_mult.nn.multipliers import MultipliedMatrix
from lit_mult.training.module import LitLlama

VOCAB = 23
SHAPE = {"d_model": 32, "n_layers": 2, "head_dim": 8, "mlp_ratio": 1.5, "num_key_value_groups": 1}
KINDS = ["none", "fixed", "scalar", "vector"]


def configure(model: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    return RunConfig.from_dict({"model": SHAPE | (model or {}), **settings})


def build(config: RunConfig, seed: int = 0) -> Llama:
    return initialized(config, VOCAB, seed)


def tokens(*size: int, seed: int = 5) -> Tensor:
    return torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(seed))


def shake(model: Llama, seed: int = 3) -> None:
    """Move norms and multipliers off their start at 1, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)


def hugging_face_twin(model: Llama, config: RunConfig) -> PreTrainedModel:
    """Hugging Face's model with the merged weights of ours."""
    shape = config.model
    kinds: Any = (Qwen3ForCausalLM, Qwen3Config) if shape.qk_norm else (LlamaForCausalLM, LlamaConfig)
    twin: PreTrainedModel = kinds[0](
        kinds[1](
            vocab_size=VOCAB,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            merged = module.merged_weight() if isinstance(module, MultipliedMatrix) else module.weight.detach()
            weights[name if name == "lm_head" else f"model.{name}"] = merged
    twin.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return twin


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"num_key_value_groups": 2},
        {"num_key_value_groups": 4},
        {"rope_theta": 5e5},
        {"num_key_value_groups": 2, "qk_norm": True},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_hugging_face(kind: str, model: dict[str, Any]) -> None:
    config = configure(
        model,
        multipliers=kind,
        parametrization={"preset": "falcon-h1-0.5b", "width_rule": "multiplier", "base_d_model": 32},
    )
    ours = build(config)
    shake(ours)
    theirs = hugging_face_twin(ours, config)
    ids_BT, targets_BT = tokens(2, 11), tokens(2, 11, seed=6)
    logits_BTV, wanted_BTV = ours(ids_BT), theirs(ids_BT).logits
    torch.testing.assert_close(logits_BTV, wanted_BTV, rtol=1e-5, atol=1e-5)

    for out_BTV in (logits_BTV, wanted_BTV):
        torch.nn.functional.cross_entropy(out_BTV.flatten(0, 1), targets_BT.flatten()).backward()
    reference = {name.removeprefix("model."): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, module in ours.named_modules():
        if not hasattr(module, "weight"):
            continue
        G = reference[f"{name}.weight"]
        if isinstance(module, MultipliedMatrix):  # arXiv:2601.04890 eq. 4 from the gradient G of the merged matrix
            s = module.scalar if module.scalar is not None else 1.0
            r = module.row[:, None] if module.row is not None else 1.0
            c = module.column if module.column is not None else 1.0
            a, W = module.constant, module.weight
            assert_near(module.weight.grad, a * s * r * c * G)
            if module.scalar is not None:
                terms = a * r * W * c * G
                assert_near(module.scalar.grad, terms.sum(), of=terms.detach().abs().sum().item())  # 0 before a norm
            if module.row is not None:
                assert_near(module.row.grad, (a * s * W * c * G).sum(1))
            if module.column is not None:
                assert_near(module.column.grad, (a * s * r * W * G).sum(0))
        else:
            assert_near(module.weight.grad, G)


def assert_near(got: Tensor | None, want: Tensor, of: float | None = None) -> None:
    """Equal to 1e-5 of the largest entry (or `of` the size of what was summed), as sums in another order are."""
    assert got is not None
    of = float(want.detach().abs().max()) if of is None else of
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * of + 1e-8)


def test_attention_scale_of_mup_is_one_over_head_dim() -> None:
    # 1/head_dim is 1/sqrt(head_dim) once the queries are divided by sqrt(head_dim) too.
    plain, mup = build(configure()), build(configure(parametrization={"attention_scale": "1/head_dim"}))
    ids_BT = tokens(2, 9)
    assert not torch.allclose(mup(ids_BT), plain(ids_BT), atol=1e-4)
    for block in plain.layers:
        block.self_attn.q_proj.weight.data /= 8**0.5
    torch.testing.assert_close(mup(ids_BT), plain(ids_BT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "vector"])
def test_no_logit_depends_on_a_later_token(kind: str) -> None:
    model = build(configure(multipliers=kind))
    T = 7
    seen: list[Tensor] = []
    model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(out))
    logits_BTV = model(tokens(1, T))
    for t in range(T):
        (gradient_BTD,) = torch.autograd.grad(logits_BTV[0, t].square().sum(), seen, retain_graph=True)
        reach_T = gradient_BTD[0].abs().amax(-1)
        assert (reach_T[: t + 1] > 0).all()
        assert (reach_T[t + 1 :] == 0).all()


def test_order_of_earlier_tokens_matters() -> None:
    model = build(configure())
    ids_BT = torch.tensor([[1, 2, 3, 4]])
    swapped_BT = torch.tensor([[2, 1, 3, 4]])
    assert not torch.allclose(model(ids_BT)[0, -1], model(swapped_BT)[0, -1], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_the_embedding_matrix_without_the_embeddings_multipliers(kind: str) -> None:
    model = build(configure({"tie_embeddings": True}, multipliers=kind))
    shake(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert [axis for axis in ("scalar", "row", "column") if getattr(model.lm_head, axis) is not None] == []
    # d_model = base_d_model = 32 and embedding_std = 1: the head's constant is its untied std, 1/sqrt(32)
    torch.testing.assert_close(model.lm_head.effective_weight(), model.embed_tokens.weight / 32**0.5)


def test_width_changes_the_number_of_heads_not_their_size() -> None:
    for d_model, n_heads in ((32, 4), (64, 8), (128, 16)):
        config = configure({"d_model": d_model, "num_key_value_groups": 2})
        model = build(config)
        attention = model.layers[0].self_attn
        assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (n_heads, n_heads // 2, 8)
        assert attention.k_proj.weight.shape == (d_model // 2, d_model)
        assert attention.scale == 8**-0.5


def test_dropout_acts_in_training_alone() -> None:
    model, without = build(configure({"dropout": 0.5})), build(configure())
    ids_BT = tokens(2, 9)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(ids_BT), model(ids_BT))
    assert torch.equal(model.eval()(ids_BT), without(ids_BT))
    assert torch.equal(without.train()(ids_BT), without.eval()(ids_BT))


def test_the_rotary_table_follows_the_sequence() -> None:
    used, fresh = build(configure()), build(configure())
    long_BT = tokens(1, 13)
    short = used(long_BT[:, :4])
    assert torch.equal(used(long_BT), fresh(long_BT))
    assert torch.equal(used(long_BT[:, :4]), short)
    torch.testing.assert_close(used(long_BT)[:, :4], short)  # causal: the prefix does not see the rest


def test_a_model_can_be_trained_after_a_forward_in_inference_mode() -> None:
    model = build(configure(multipliers="vector"))
    with torch.inference_mode():
        model(tokens(1, 9))
    model(tokens(1, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_z_loss_is_in_the_training_loss_alone() -> None:
    window_BT1 = tokens(3, 10)
    plain = LitLlama(configure().to_dict(), VOCAB)
    with_z = LitLlama(configure({"z_loss": 0.01}).to_dict(), VOCAB)
    logits_BTV = plain(window_BT1[:, :-1])
    cross_entropy = -logits_BTV.log_softmax(-1).gather(-1, window_BT1[:, 1:, None]).mean()
    z = logits_BTV.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(plain.training_step(window_BT1, 0), cross_entropy)
    torch.testing.assert_close(with_z.training_step(window_BT1, 0), cross_entropy + 0.01 * z)
    torch.testing.assert_close(with_z.last_train_loss, cross_entropy.detach())
    for module in (plain, with_z):
        module.validation_step(window_BT1, 0)
        torch.testing.assert_close(module.val_loss.compute(), cross_entropy.detach())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("rule", "expected"), [("mup", 0.25), ("standard", 1.0)])
def test_logits_start_small(rule: str, expected: float, tied: bool) -> None:
    # The head sums d = 128 products of a unit-RMS input with weights of std sqrt(base)/d (mup) or 1/sqrt(d)
    # (standard): RMS sqrt(d) std = sqrt(8/128) = 1/4, or 1.
    config = configure({"d_model": 128, "tie_embeddings": tied}, parametrization={"rule": rule, "base_d_model": 8})
    model = build(config)
    ids_BT = tokens(4, 16)
    logits_BTV = model(ids_BT)
    if tied:  # the logit of the input token itself is large: E x has the embedding of x in it
        others = torch.nn.functional.one_hot(ids_BT, VOCAB) == 0
        logits_BTV = logits_BTV[others]
    assert float(logits_BTV.detach().square().mean().sqrt()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_arms_start_from_the_same_matrices_and_logits(optimizer: str) -> None:
    ids_BT = tokens(2, 9)
    arms = {kind: build(configure(multipliers=kind, optimizer=optimizer)) for kind in KINDS}
    reference = arms["none"]
    for kind, model in arms.items():
        weights = {name: value for name, value in model.state_dict().items() if name.endswith("weight")}
        assert weights.keys() == reference.state_dict().keys()
        assert all(torch.equal(value, reference.state_dict()[name]) for name, value in weights.items()), kind
        assert torch.equal(model(ids_BT), reference(ids_BT)), kind
    assert not torch.equal(build(configure(), seed=1).embed_tokens.weight, reference.embed_tokens.weight)


def test_multipliers_start_at_one_and_matrices_at_their_planned_std() -> None:
    config = configure({"d_model": 64}, multipliers="vector", parametrization={"embedding_std": 0.02})
    model, plan = build(config), plan_run(config, VOCAB)
    for name, module in model.named_modules():
        if isinstance(module, MultipliedMatrix):
            # over n entries the estimate of a std has the relative error 1/sqrt(2n), here below 2 %: four of them
            assert float(module.weight.detach().std()) == pytest.approx(plan.matrices[name].init_std, rel=0.08)
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    assert len(vectors) == 5 + 2 + 2 * (3 + 2 + 2 + 2)  # norms; embedding; q, k, v; o; gate, up; down
    assert all((vector == 1).all() for vector in vectors)


def test_a_model_can_be_built_on_the_meta_device_and_filled_later() -> None:
    config = configure(multipliers="vector")
    plan = plan_run(config, VOCAB)
    with torch.device("meta"):
        model = Llama(config.model, plan)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.empty(2, 5, dtype=torch.long, device="meta")).shape == (2, 5, VOCAB)
    model.to_empty(device="cpu")
    initialize(model, plan, seed=0)
    assert torch.equal(model(tokens(2, 5)), build(config)(tokens(2, 5)))
