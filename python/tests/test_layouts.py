"""Layouts: made of what ranks hold, and refused by name where that is not what it should be."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import model
import numpy as np
import pytest

from refit_rl import errors, layouts


def specs(tensors: dict[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tensor.shape, "float32") for name, tensor in tensors.items()}


def trainer(rank: int = 0, **changes: object) -> layouts.Layout:
    held = specs(model.megatron(model.checkpoint(0), rank, 2))
    return layouts.megatron(model.CONFIG, held, rank=rank, tp_rank=rank, tp_size=2, **changes)


def test_a_layout_says_what_the_rank_holds() -> None:
    layout = trainer(1)
    assert (layout.side, layout.rank, layout.post_actions) == ("source", 1, [])
    held = model.megatron(model.checkpoint(0), 1, 2)
    assert layout.names == sorted(held) and len(layout) == len(held)
    assert layout.nbytes == sum(tensor.nbytes for tensor in held.values())
    assert layout.spec("decoder.final_layernorm.weight") == ("F32", 16, 1)
    with pytest.raises(KeyError):
        layout.spec("nothing")
    assert "rank 1" in repr(layout)


def test_tensors_themselves_do_in_place_of_their_specs() -> None:
    held = model.megatron(model.checkpoint(0), 0, 2)
    assert trainer() == layouts.megatron(model.CONFIG, held, rank=0, tp_rank=0, tp_size=2)


def test_a_configuration_is_a_dict_a_file_or_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(model.CONFIG))
    held = specs(model.vllm(model.checkpoint(0)))
    made = [layouts.vllm(config, held, rank=0) for config in (model.CONFIG, file, str(tmp_path))]
    assert made[0] == made[1] == made[2] and made[0].side == "target"
    with pytest.raises(errors.ConfigError, match="no-such-file"):
        layouts.vllm(tmp_path / "no-such-file", held, rank=0)
    file.write_text("{}")
    with pytest.raises(errors.ConfigError, match="config.json"):
        layouts.vllm(file, held, rank=0)


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", "BF16"])
def test_dtypes_go_by_anybodys_names(name: str) -> None:
    held = {name_: (shape, name) for name_, (shape, _) in specs(model.vllm(model.checkpoint(0))).items()}
    assert layouts.vllm(model.CONFIG, held, rank=0).spec("model.norm.weight")[0] == "BF16"


def test_a_dtype_that_nobody_has_is_refused() -> None:
    with pytest.raises(errors.LayoutError, match="complex64") as caught:
        layouts.shards({"w": ((2,), np.dtype("complex64"), (0,), (2,))}, rank=0)
    assert caught.value.tensors == ("w",)


def test_a_tensor_of_another_shape_is_named() -> None:
    held = specs(model.megatron(model.checkpoint(0), 0, 2))
    held["decoder.layers.1.mlp.linear_fc1.weight"] = ((23, 16), "float32")
    with pytest.raises(errors.LayoutError, match=r"\[23, 16\], expected \[24, 16\]") as caught:
        layouts.megatron(model.CONFIG, held, rank=3, tp_rank=0, tp_size=2)
    assert caught.value.tensors == ("decoder.layers.1.mlp.linear_fc1.weight",)
    assert caught.value.ranks == (3,)


def test_missing_and_unknown_tensors_are_named() -> None:
    held = specs(model.vllm(model.checkpoint(0)))
    del held["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(errors.LayoutError) as caught:
        layouts.vllm(model.CONFIG, held, rank=0)
    assert caught.value.tensors == ("model.layers.1.mlp.down_proj.weight",)
    held = specs(model.vllm(model.checkpoint(0)))
    held["model.layers.0.mlp.extra"] = ((1,), "float32")
    with pytest.raises(errors.LayoutError, match="does not know") as caught:
        layouts.vllm(model.CONFIG, held, rank=0)
    assert caught.value.tensors == ("model.layers.0.mlp.extra",)


def test_facts_that_names_do_not_show_are_refused() -> None:
    with pytest.raises(errors.RefusedError, match="overlap_param_gather"):
        trainer(facts={"overlap_param_gather": True})
    assert trainer(facts={"overlap_param_gather": True, "params_synced": True}) == trainer()
    param = {"name": "decoder.final_layernorm.weight", "class": "DTensor", "layer": "RMSNorm"}
    with pytest.raises(errors.RefusedError, match="Megatron-FSDP"):
        trainer(facts={"params": [param]})
    held = specs(model.vllm(model.checkpoint(0)))
    layer = {"name": "model.layers.0.mlp", "quant_method": "GPTQMarlinLinearMethod"}
    with pytest.raises(errors.RefusedError, match="Marlin"):
        layouts.vllm(model.CONFIG, held, rank=0, facts={"layers": [layer]})
    with pytest.raises(errors.RefusedError, match="CPU"):
        cpu = {"name": "model.layers.0.mlp", "quant_method": "UnquantizedLinearMethod"}
        layouts.vllm(model.CONFIG, held, rank=0, facts={"device": "cpu", "layers": [cpu]})


def test_a_fact_that_is_not_known_is_not_passed_over() -> None:
    with pytest.raises(errors.ConfigError, match="`overlap_param_gahter` is not known"):
        trainer(facts={"overlap_param_gahter": True})
    with pytest.raises(errors.ConfigError, match="`gtp_weight_remat_size` is 'two'"):
        trainer(facts={"gtp_weight_remat_size": "two"})


def test_sizes_that_cannot_be_are_refused() -> None:
    held = specs(model.megatron(model.checkpoint(0), 0, 2))
    with pytest.raises(errors.ConfigError, match="tp_size"):
        layouts.megatron(model.CONFIG, held, rank=0, tp_rank=2, tp_size=2)
    with pytest.raises(errors.ConfigError, match="pp_size"):
        layouts.megatron(model.CONFIG, held, rank=0, pp_rank=5, pp_size=2)
    with pytest.raises(errors.ConfigError, match="expert_parallel is `round`"):
        layouts.vllm(model.CONFIG, specs(model.vllm(model.checkpoint(0))), rank=0, expert_parallel="round")


@pytest.mark.parametrize("names", ["flat", "routed"])
def test_experts_are_called_as_the_rank_calls_them(names: str) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "float32",
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
    }
    at = "model.layers.0."
    prefix = at + "mlp.experts." + ("routed_experts." if names == "routed" else "")
    held = {
        "model.embed_tokens.weight": (64, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (64, 16),
        at + "input_layernorm.weight": (16,),
        at + "post_attention_layernorm.weight": (16,),
        at + "self_attn.qkv_proj.weight": (64, 16),
        at + "self_attn.o_proj.weight": (16, 32),
        at + "self_attn.q_norm.weight": (8,),
        at + "self_attn.k_norm.weight": (8,),
        at + "mlp.gate.weight": (4, 16),
        prefix + "w13_weight": (4, 16, 16),
        prefix + "w2_weight": (4, 16, 8),
    }
    tensors = {name: (shape, "float32") for name, shape in held.items()}
    said = layouts.vllm(config, tensors, rank=0, expert_names=names)
    assert layouts.vllm(config, tensors, rank=0) == said
    other = "flat" if names == "routed" else "routed"
    with pytest.raises(errors.LayoutError):
        layouts.vllm(config, tensors, rank=0, expert_names=other)


def test_pipeline_stages_are_split_evenly_or_as_they_are_said() -> None:
    full = specs(model.megatron(model.checkpoint(0), 0, 1))
    last = {
        name.replace("layers.1.", "layers.0."): spec
        for name, spec in full.items()
        if "layers.0." not in name and "word_embeddings" not in name
    }
    even = layouts.megatron(model.CONFIG, last, rank=1, pp_rank=1, pp_size=2)
    said = layouts.megatron(model.CONFIG, last, rank=1, pp_rank=1, pp_size=2, chunks=[[1]])
    assert even == said


def test_layouts_cross_processes() -> None:
    for layout in (trainer(), layouts.vllm(model.CONFIG, specs(model.vllm(model.checkpoint(0))), rank=0)):
        assert pickle.loads(pickle.dumps(layout)) == layout


def test_post_actions_go_along() -> None:
    layout = layouts.bands(TARGET)
    _, (text, _) = layout.__reduce__()
    actions = [
        {"kind": "absorb_mla", "params": ["a", "b"]},
        {"kind": "copy_sinks", "params": ["c"]},
        {"kind": "drop_caches", "params": []},
    ]
    made = type(layout)._restore(text, actions)
    assert made.post_actions == actions
    assert pickle.loads(pickle.dumps(made)).post_actions == actions


TARGET = {
    "schema": 1,
    "side": "target",
    "tensors": {"gate": [4, 6], "up": [4, 6]},
    "ranks": [
        {
            "rank": 0,
            "params": {
                "gate_up": {
                    "dtype": "F32",
                    "shape": [8, 6],
                    "bands": [{"tensor": "gate"}, {"tensor": "up", "at": [4, 0]}],
                }
            },
        }
    ],
}


def test_bands_are_a_dict_a_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "bands.json"
    file.write_text(json.dumps(TARGET))
    made = [layouts.bands(it) for it in (TARGET, json.dumps(TARGET), file, str(file))]
    assert all(layout == made[0] for layout in made)
    assert layouts.bands(made[0].to_json(), rank=0) == made[0]
    with pytest.raises(errors.ConfigError, match=r"ranks \[0\]"):
        layouts.bands(TARGET, rank=1)
    with pytest.raises(errors.ConfigError, match="cannot read"):
        layouts.bands(tmp_path / "none.json")


def test_bands_that_leave_bytes_open_are_refused() -> None:
    document = json.loads(json.dumps(TARGET))
    del document["ranks"][0]["params"]["gate_up"]["bands"][1]
    with pytest.raises(errors.LayoutError, match="gate_up"):
        layouts.bands(document)


def test_shards_are_boxes() -> None:
    given = {
        "w": ((8, 6), "bfloat16", (4, 0), (4, 6)),
        "v": {"global_shape": [5], "dtype": np.dtype("float32"), "offsets": [3], "local_shape": [2]},
        "none": ((8, 6), "bfloat16", (8, 0), (0, 6)),
    }
    layout = layouts.shards(given, rank=2)
    assert (layout.rank, layout.names, layout.side) == (2, ["v", "w"], "source")
    assert (layout.spec("w"), layout.spec("v")) == (("BF16", 4, 6), ("F32", 2, 1))
    assert layouts.shards(given, rank=2, side="target").side == "target"
    with pytest.raises(errors.LayoutError, match="dimension 0") as caught:
        layouts.shards({"w": ((8, 6), "bfloat16", (6, 0), (4, 6))}, rank=0)
    assert caught.value.tensors == ("w",)
    with pytest.raises(errors.LayoutError, match="global_shape, dtype"):
        layouts.shards({"w": ((8, 6), "bfloat16")}, rank=0)
    with pytest.raises(errors.LayoutError, match="whole numbers"):
        layouts.shards({"w": ((8, -6), "bfloat16", (0, 0), (8, 6))}, rank=0)
