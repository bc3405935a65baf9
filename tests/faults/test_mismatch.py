"""Models that do not belong together: an error that names file, tensor and mend, or the right result."""

from __future__ import annotations

import json

import pytest
import torch
from families import generator, load, save, tuned_tensors
from safetensors.torch import load_file, save_file

import superpose as library
from faults.damage import MERGED, NAME, REFUSED, adapter, merge_refused, merged_or_refused, small_base
from superpose.checkpoints.models import open_model
from superpose.reading import read_tensor

GROUP = "Mismatch"
QUERY = "layers.0.self_attn.q_proj.weight"


def mean(base, tuned, names):
    return {name: ((base[name].double() + tuned[name].double()) / 2).to(base[name].dtype) for name in names}


def write(root, tuned, base=None):
    base = small_base() if base is None else base
    return save(root / "base", base), save(root / "tuned", tuned)


def renamed(tensors, change):
    return {change(name): tensor for name, tensor in tensors.items()}


def reshaped(tensors, **shapes):
    return {
        name: torch.randn(shapes.get(name.replace(".", "_"), tuple(tensor.shape)), generator=generator(name))
        for name, tensor in tensors.items()
    }


OTHERS = {
    "another architecture": (
        lambda t: renamed(t, lambda name: name.replace("self_attn.q_proj", "attention.query").replace("layers", "h")),
        ["tensor missing"],
    ),
    "no name in common": (lambda t: {f"x{number}": tensor for number, tensor in enumerate(t.values())}, ["missing"]),
    "a layer less": (lambda t: {name: x for name, x in t.items() if ".0." not in name}, ["tensor missing", QUERY]),
    "a layer more": (
        lambda t: {**t, **{name.replace(".0.", ".1."): x.clone() for name, x in t.items() if ".0." in name}},
        ["that the base does not have", "layers.1.", "drop: true"],
    ),
    "another width": (
        lambda t: {name: torch.ones([2 * size for size in x.shape]) for name, x in t.items()},
        [QUERY, "shape 16 x 16, the base has 8 x 8"],
    ),
    "another vocabulary": (
        lambda t: {**t, "embed_tokens.weight": torch.ones(41, 8), "lm_head.weight": torch.ones(41, 8)},
        ["41 rows (vocabulary or classes), the base has 40", "lm_head.weight", "embed_tokens.weight", "keep: base"],
    ),
    "weights transposed": (
        lambda t: {**t, NAME: t[NAME].T.contiguous()},
        [NAME, "shape 8 x 24, the base has 24 x 8", "keep: base"],
    ),
    "a dimension more": (lambda t: {**t, NAME: t[NAME][None].contiguous()}, [NAME, "shape 1 x 24 x 8"]),
    "a scalar in place of a vector": (lambda t: {**t, "norm.weight": torch.tensor(1.0)}, ["norm.weight", "scalar"]),
    "integers in place of numbers": (lambda t: {**t, NAME: t[NAME].to(torch.int8)}, [NAME, "dtype I8", "F32"]),
    "float8 in place of numbers": (
        lambda t: {**t, NAME: t[NAME].to(torch.float8_e4m3fn)},
        [NAME, "dtype F8_E4M3", "F32"],
    ),
    "complex in place of numbers": (lambda t: {**t, NAME: t[NAME].to(torch.complex64)}, [NAME, "C64"]),
}


@pytest.mark.parametrize("fault", OTHERS)
def test_a_model_of_another_sort_is_refused_by_file_tensor_and_mend(tmp_path, tally, fault):
    change, said = OTHERS[fault]
    base, tuned = write(tmp_path, change(tuned_tensors(small_base(), 1)))
    with tally(GROUP, fault) as injection:
        wanted = [*said, str(tuned / "model.safetensors"), "mend: "]
        injection.outcome = merged_or_refused(base, [tuned], tmp_path / "out", wanted)
        assert injection.outcome == REFUSED


@pytest.mark.parametrize("fault", ["another vocabulary", "weights transposed", "a layer less"])
def test_the_command_line_refuses_it_too(tmp_path, tally, forks, fault):
    change, said = OTHERS[fault]
    base, tuned = write(tmp_path, change(tuned_tensors(small_base(), 1)))
    with tally(GROUP, fault, "command line") as injection:
        injection.outcome = merge_refused(forks, tmp_path, base, tuned, names=[*said, str(tuned)])


def test_what_an_error_says_to_do_does_it(tmp_path, tally):
    """The rules that errors name, put into a recipe, make the merge that the user can have."""
    tuned = {**tuned_tensors(small_base(), 1), "embed_tokens.weight": torch.ones(41, 8), "extra.weight": torch.ones(2)}
    tuned[NAME] = tuned[NAME].T.contiguous()
    base, other = write(tmp_path, tuned)
    rules = [
        {"match": "embed_tokens.weight", "keep": "base"},
        {"match": NAME, "keep": "base"},
        {"match": "extra.weight", "drop": True},
    ]
    with tally(GROUP, "mended by the rules named") as injection:
        assert merged_or_refused(base, [other], tmp_path / "out") == REFUSED
        injection.outcome = merged_or_refused(base, [other], tmp_path / "out", rules=rules)
        assert injection.outcome == MERGED
    found, expected = load(tmp_path / "out"), small_base()
    assert all(torch.equal(found[name], expected[name]) for name in ("embed_tokens.weight", NAME))
    assert torch.allclose(found[QUERY], tuned[QUERY])


def test_a_square_weight_stored_the_other_way_round_cannot_be_told(tmp_path, tally):
    """Headers show nothing: the merge is of the numbers as they are stored."""
    tuned = tuned_tensors(small_base(), 1)
    base, other = write(tmp_path, {**tuned, QUERY: tuned[QUERY].T.contiguous()})
    with tally(GROUP, "a square weight transposed") as injection:
        assert merged_or_refused(base, [other], tmp_path / "out") == MERGED
        assert torch.allclose(load(tmp_path / "out")[QUERY], tuned[QUERY].T)
        injection.outcome = "merged as stored"


# Ties.


@pytest.mark.parametrize("where", ["base", "tuned"])
def test_ties_here_and_not_there(tmp_path, tally, where):
    """Weights that one model shares and the other has twice: refused, or both ends right."""
    tensors = small_base()
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    loose = tuned_tensors(small_base(), 1)
    for role in ("base", "tuned"):
        (tmp_path / role).mkdir()
        content = tensors if role == where else loose
        torch.save(content, tmp_path / role / "pytorch_model.bin")
    with tally(GROUP, f"tied in the {where} alone", "torch.save") as injection:
        injection.outcome = merged_or_refused(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", ["tie"])
        if injection.outcome == MERGED:
            found = load(tmp_path / "out")
            tuned = tensors if where == "tuned" else loose
            for name in found:
                assert torch.allclose(found[name], tuned[name]), name
            assert where == "base" or "lm_head.weight" in found


def test_a_tied_head_that_is_not_stored_is_the_embedding(tmp_path, tally):
    """A fine-tune saved without its head, whose base has both: its head is its embedding, by the config alone."""
    tensors = small_base()
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    tuned = {name: tensor for name, tensor in tuned_tensors(tensors, 1).items() if name != "lm_head.weight"}
    base, other = write(tmp_path, tuned, tensors)
    with tally(GROUP, "a head that is not stored", "no config") as injection:
        injection.outcome = merged_or_refused(base, [other], tmp_path / "out", ["tensor missing", "lm_head.weight"])
        assert injection.outcome == REFUSED


# Prefixes.


@pytest.mark.parametrize("longer", ["base", "tuned"])
def test_names_with_and_without_the_bodys_prefix_are_matched(tmp_path, tally, longer):
    plain, tuned = small_base(), tuned_tensors(small_base(), 1)
    put = dict.fromkeys(("base", "tuned"), lambda name: name)
    put[longer] = lambda name: name if name == "lm_head.weight" else f"model.{name}"
    base, other = write(
        tmp_path,
        renamed(tuned, put["tuned"]),
        renamed(plain, put["base"]),
    )
    with tally(GROUP, f"a prefix in the {longer} alone") as injection:
        injection.outcome = merged_or_refused(base, [other], tmp_path / "out")
        assert injection.outcome == MERGED
        found = load(tmp_path / "out")
        assert found.keys() == renamed(plain, put["base"]).keys()
        for name, tensor in tuned.items():
            assert torch.allclose(found[put["base"](name)], tensor)


# Dtypes.


@pytest.mark.parametrize("here", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("there", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_of_base_and_fine_tune_may_differ(tmp_path, tally, here, there):
    """Computed in what holds both, and rounded once, to the base's."""
    base = {name: tensor.to(here) for name, tensor in small_base().items()}
    tuned = {name: tensor.to(there) for name, tensor in tuned_tensors(small_base(), 1).items()}
    folders = write(tmp_path, tuned, base)
    again = save(tmp_path / "again", base)
    with tally(GROUP, "dtypes that differ", f"{here} and {there}".replace("torch.", "")) as injection:
        injection.outcome = merged_or_refused(folders[0], [folders[1], again], tmp_path / "out")
        assert injection.outcome == MERGED
        for name, tensor in load(tmp_path / "out").items():
            assert tensor.dtype == here
            expected = (base[name].double() + tuned[name].double()) / 2
            eps = torch.finfo(here).eps
            assert torch.allclose(tensor.double(), expected, rtol=max(eps, 1e-6), atol=max(eps, 1e-6) * 1e-2), name


def test_dtypes_mixed_within_a_model_are_kept(tmp_path, tally):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    base = {name: tensor.to(dtypes[at % 4]) for at, (name, tensor) in enumerate(small_base().items())}
    tuned = {name: tensor.to(dtypes[(at + 1) % 4]) for at, (name, tensor) in enumerate(tuned_tensors(base, 1).items())}
    folders = write(tmp_path, tuned, base)
    with tally(GROUP, "dtypes mixed within a model") as injection:
        injection.outcome = merged_or_refused(folders[0], [folders[1]], tmp_path / "out")
        assert injection.outcome == MERGED
        assert {name: t.dtype for name, t in load(tmp_path / "out").items()} == {n: t.dtype for n, t in base.items()}


def test_numbers_beyond_the_bases_dtype_are_refused_or_told(tmp_path, tally):
    base = {name: tensor.half() for name, tensor in small_base().items()}
    tuned = {name: tensor.float() for name, tensor in base.items()}
    tuned[NAME] = torch.full((24, 8), 1e6)
    folders = write(tmp_path, tuned, base)
    with tally(GROUP, "numbers beyond the base's dtype") as injection:
        injection.outcome = merged_or_refused(folders[0], [folders[1]], tmp_path / "out", [NAME])
        if injection.outcome == MERGED:
            record = library.RunRecord.load(tmp_path / "out")
            assert any(NAME in warning for warning in record.warnings)
            injection.outcome = "merged with a warning"


# Adapters.


def test_an_adapter_of_another_base_is_refused(tmp_path, tally):
    base = save(tmp_path / "base", small_base())
    folder = adapter(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for fault, change in {
        "another width": lambda name, x: torch.ones(2, 16) if "lora_A" in name else x,
        "another height": lambda name, x: torch.ones(25, 2) if "lora_B" in name else x,
    }.items():
        save_file({name: change(name, tensor) for name, tensor in tensors.items()}, file)
        with tally(GROUP, f"adapter of another base: {fault}") as injection:
            wanted = [str(file), NAME, "does not fit a weight of 24 x 8", "use an adapter of this very base"]
            injection.outcome = merged_or_refused(base, [folder], tmp_path / "out", wanted, method="task_arithmetic")
            assert injection.outcome == REFUSED
    save_file(renamed(tensors, lambda name: name.replace("layers.0", "layers.7")), file)
    with tally(GROUP, "adapter of another base: other layers") as injection:
        wanted = [str(folder), "layers.7.mlp.up_proj.weight", "trained on base"]
        injection.outcome = merged_or_refused(base, [folder], tmp_path / "out", wanted, method="task_arithmetic")
        assert injection.outcome == REFUSED


def test_the_command_line_refuses_an_adapter_of_another_base(tmp_path, tally, forks):
    base = save(tmp_path / "base", {**small_base(), NAME: torch.ones(20, 8)})
    folder = adapter(tmp_path / "adapter")
    with tally(GROUP, "adapter of another base: another height", "command line") as injection:
        injection.outcome = merge_refused(
            forks, tmp_path, base, folder, "-m", "task_arithmetic", names=[NAME, str(folder)]
        )


def test_an_adapter_and_a_whole_fine_tune_are_merged_together(tmp_path, tally):
    base, tuned = write(tmp_path, tuned_tensors(small_base(), 1))
    folder = adapter(tmp_path / "adapter")
    with tally(GROUP, "an adapter beside a whole fine-tune") as injection:
        injection.outcome = merged_or_refused(
            base, [tuned, folder], tmp_path / "out", method="task_arithmetic", options={"scaling_factor": 1.0}
        )
        assert injection.outcome == MERGED
        factors = load_file(folder / "adapter_model.safetensors")
        update = (
            2.0
            * factors[f"base_model.model.{NAME[:-7]}.lora_B.weight"]
            @ factors[f"base_model.model.{NAME[:-7]}.lora_A.weight"]
        )
        found, whole = load(tmp_path / "out"), load(tuned)
        assert torch.allclose(found[NAME], whole[NAME] + update, atol=1e-5)
        assert torch.allclose(found[QUERY], whole[QUERY], atol=1e-6)


def test_an_adapter_as_the_base_is_refused(tmp_path, tally):
    _, tuned = write(tmp_path, small_base())
    folder = adapter(tmp_path / "adapter")
    with tally(GROUP, "an adapter as the base") as injection:
        injection.outcome = merged_or_refused(folder, [tuned], tmp_path / "out", [str(folder), "an adapter alone"])
        assert injection.outcome == REFUSED


def test_a_model_with_an_adapter_applied_is_a_model(tmp_path, tally):
    base, tuned = write(tmp_path, tuned_tensors(small_base(), 1))
    folder = adapter(tmp_path / "adapter")
    with tally(GROUP, "MODEL+ADAPTER as a fine-tune") as injection:
        injection.outcome = merged_or_refused(base, [f"{tuned}+{folder}"], tmp_path / "out")
        assert injection.outcome == MERGED
        applied = open_model(f"{tuned}+{folder}")
        for name, tensor in load(tmp_path / "out").items():
            assert torch.allclose(tensor, read_tensor(applied.tensors[name])), name


# Configs that contradict the weights.


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 80},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "no such model"},
        {"model_type": ["llama"]},
        {"model_type": "llama", "architectures": "LlamaForCausalLM"},
        {"model_type": "llama", "hidden_size": -1, "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama", "hidden_size": "wide", "architectures": ["LlamaForCausalLM"]},
        {"tie_word_embeddings": True, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
         "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 24, "vocab_size": 40, "num_attention_heads": 2},
    ],
    ids=["larger", "other", "unknown", "list", "text", "negative", "words", "tied in the config alone"],
)  # fmt: skip
def test_a_config_of_another_model_changes_no_number(tmp_path, tally, config):
    base, tuned = write(tmp_path, tuned_tensors(small_base(), 1))
    for folder in (base, tuned):
        (folder / "config.json").write_text(json.dumps(config))
    with tally(GROUP, "a config of another model") as injection:
        injection.outcome = merged_or_refused(base, [tuned], tmp_path / "out")
        assert injection.outcome == MERGED
        for name, tensor in load(tmp_path / "out").items():
            assert torch.allclose(tensor, load(tuned)[name]), name


def test_a_model_that_is_quantised_is_refused(tmp_path, tally):
    base, tuned = write(tmp_path, tuned_tensors(small_base(), 1))
    (tuned / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with tally(GROUP, "a quantised model") as injection:
        wanted = [str(tuned / "config.json"), "quantised"]
        injection.outcome = merged_or_refused(base, [tuned], tmp_path / "out", wanted)
        assert injection.outcome == REFUSED
