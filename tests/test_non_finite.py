"""NaN and infinity in inputs: refused by model, tensor and count; or zeroed, or kept in their places."""

import json
import math

import pytest
import torch
from families import base_tensors, load, make_family, save, superpose, tuned_tensors
from safetensors.torch import save_file

import superpose as library
from superpose import Problems, SuperposeError, list_methods, merge_tensors
from superpose.records import RunRecord

METHODS = [method.name for method in list_methods() if not method.needs]
BAD = {"layers.0.mlp.up_proj.weight": (3, math.nan), "norm.weight": (2, math.inf), "logit_scale": (0, -math.inf)}


def with_bad(tensors, places):
    """Return copies of tensors with what is not finite at one place each."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, (place, value) in places.items():
        copies[name].view(-1)[place] = value
    return copies


def as_if_mended(base, tuned):
    """Return base and fine-tunes with what "zero" says in place of what is not finite."""
    sound = {name: torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor)) for name, tensor in base.items()}
    return sound, [
        {name: torch.where(tensor.isfinite(), tensor, sound[name]) for name, tensor in model.items()} for model in tuned
    ]


def family(bad_in):
    base = base_tensors()
    tuned = [tuned_tensors(base, seed) for seed in (1, 2, 3)]
    models = [base, *tuned]
    models[bad_in] = with_bad(models[bad_in], BAD)
    return models[0], models[1:]


@pytest.mark.parametrize("bad_in", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_zero_is_a_merge_of_mended_inputs(method, bad_in):
    base, tuned = family(bad_in)
    tuned = tuned[:2] if method == "slerp" else tuned
    expected = merge_tensors(*as_if_mended(base, tuned), method)
    merged = merge_tensors(base, tuned, method, non_finite="zero")
    assert all(torch.equal(merged[name], expected[name]) for name in base)


@pytest.mark.parametrize("bad_in", [0, 2])
@pytest.mark.parametrize("method", ["average", "stf", "ties", "tsv", "dare"])
def test_keep_changes_the_entries_alone_that_were_not_finite(method, bad_in):
    base, tuned = family(bad_in)
    expected = merge_tensors(base, tuned, method, non_finite="zero")
    merged = merge_tensors(base, tuned, method, non_finite="keep")
    for name in base:
        want = expected[name].clone()
        if name in BAD:
            place, value = BAD[name]
            want.view(-1)[place] = value
        assert torch.equal(merged[name].nan_to_num(7.0, 8.0, 9.0), want.nan_to_num(7.0, 8.0, 9.0)), name


def test_infinities_of_both_signs_are_kept_as_nan():
    base = {"a.weight": torch.zeros(2, 2)}
    tuned = [{"a.weight": torch.tensor([[1.0, sign * math.inf], [0.0, 2.0]])} for sign in (1, -1)]
    merged = merge_tensors(base, tuned, "average", non_finite="keep")["a.weight"]
    assert merged.isnan().tolist() == [[False, True], [False, False]]
    one = merge_tensors(base, tuned[:1], "average", non_finite="keep")["a.weight"]
    assert one[0, 1] == math.inf


def test_every_input_is_refused_by_model_tensor_and_count(tmp_path):
    base = base_tensors()
    bad = {"norm.weight": (2, math.nan)}
    folders = [save(tmp_path / "base", with_bad(base, bad))]
    folders += [save(tmp_path / name, with_bad(tuned_tensors(base, 1), bad)) for name in ("math", "code")]
    with pytest.raises(Problems) as caught:
        library.merge({"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]]}, tmp_path / "out")
    said = [(problem.what, problem.where) for problem in caught.value.problems]
    assert [what for what, _ in said] == [
        f"1 entries are NaN or infinite in model {model}" for model in ("base", "math", "code")
    ]
    assert all("norm.weight" in where for _, where in said)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line_and_in_the_record(tmp_path):
    folders = make_family(tmp_path)
    tensors = with_bad(load(folders[2]), {"layers.1.mlp.up_proj.weight": (5, math.nan)})
    folders[2] = save(tmp_path / "broken", tensors)
    refused = superpose("merge", *folders, "-o", tmp_path / "out", "--method", "ties", check=False)
    assert refused.returncode == 2
    assert "1 entries are NaN or infinite in model broken" in refused.stderr
    assert "--non-finite" in refused.stderr
    for treatment, kept in (("zero", 0), ("keep", 1)):
        out = tmp_path / treatment
        done = superpose("merge", *folders, "-o", out, "--method", "ties", "--non-finite", treatment)
        assert "layers.1.mlp.up_proj.weight: 1 entries of broken" in done.stderr
        assert sum(int((~tensor.isfinite()).sum()) for tensor in load(out).values()) == kept
        assert RunRecord.load(out).recipe["non_finite"] == treatment
    wrong = superpose("merge", *folders, "-o", tmp_path / "x", "--non-finite", "ignore", check=False)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_in_pieces_as_in_one(tmp_path, monkeypatch):
    base, tuned = family(2)
    expected = merge_tensors(base, tuned, "ties", non_finite="keep")
    monkeypatch.setattr("superpose.merge_tensor.CHUNK", 64)
    merged = merge_tensors(base, tuned, "ties", non_finite="keep")
    assert all(torch.equal(merged[name].nan_to_num(), expected[name].nan_to_num()) for name in base)


def test_factors_of_adapters_are_zeroed_and_never_kept(tmp_path):
    base = {"q.weight": torch.randn(6, 5)}
    save(tmp_path / "base", base)
    down, up = torch.randn(2, 5), torch.randn(6, 2)
    down[0, 1] = math.nan
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"base_model.model.q.lora_A.weight": down, "base_model.model.q.lora_B.weight": up}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    recipe = {"base": str(tmp_path / "base"), "models": [str(tmp_path / "adapter")], "method": "task_arithmetic"}
    with pytest.raises(SuperposeError, match="1 entries are NaN or infinite in model adapter"):
        library.merge(recipe, tmp_path / "out")
    library.merge(recipe | {"non_finite": "zero"}, tmp_path / "out")
    assert load(tmp_path / "out")["q.weight"].isfinite().all()
    for form in ("adapter", "both"):
        with pytest.raises(SuperposeError, match="adapter cannot keep"):
            library.merge(recipe | {"non_finite": "keep", "output": {"form": form}}, tmp_path / "kept")


def test_a_copied_tensor_that_is_not_finite_is_told(tmp_path):
    base = with_bad(base_tensors(), {"norm.weight": (2, math.nan)})
    folders = [save(tmp_path / "base", base), save(tmp_path / "tuned", tuned_tensors(base, 1))]
    recipe = {
        "base": str(folders[0]), "models": [str(folders[1])], "method": "average",
        "rules": [{"match": "norm.weight", "keep": "base"}],
    }  # fmt: skip
    record = library.merge(recipe, tmp_path / "out")
    assert any("norm.weight: 1 entries of the base are NaN" in warning for warning in record.warnings)


def test_without_nan_the_treatment_changes_nothing(tmp_path):
    base, tuned = base_tensors(), [tuned_tensors(base_tensors(), seed) for seed in (1, 2)]
    for method in ("average", "stf", "ties"):
        expected = merge_tensors(base, tuned, method)
        for treatment in ("zero", "keep"):
            merged = merge_tensors(base, tuned, method, non_finite=treatment)
            assert all(torch.equal(merged[name], expected[name]) for name in base)
