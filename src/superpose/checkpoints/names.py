"""What a tensor is, told from its name and shape: the fall-back where no model object can be built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from superpose.kinds import Kind

# First match wins; names are matched in lower case. Norms stand before biases: a norm's bias is of kind norm.
_PATTERNS: tuple[tuple[str, Kind], ...] = (
    (r"(^|\.)(running_mean|running_var|num_batches_tracked|position_ids|inv_freq|masked_bias)$", Kind.BUFFER),
    (r"(^|\.)(token_type_ids|attention_mask|causal_mask|rotary_emb\..*)$", Kind.BUFFER),
    (r"logit_scale|logit_bias", Kind.SCALAR),
    (r"(^|[._])(layer_?norm\w*|rms_?norm|batch_?norm\d*|group_?norm|norm\w*|ln_?\w*|bn\d*)\.(weight|bias)$", Kind.NORM),
    (r"norm\.(weight|bias|scale|gamma|beta)$|\.(gamma|beta)$|(^|\.)\w*norm\w*\.(weight|bias)$", Kind.NORM),
    (r"normalization\.(weight|bias)$", Kind.NORM),
    (r"patch_embed\w*\.proj(ection)?\.weight$|patch_embeddings\.projection\.weight$", Kind.CONV),
    (r"patch_embedding\.weight$", Kind.CONV),
    # The hidden layer of a head (RoBERTa) is a linear map like any other.
    (r"(^|\.)(\w*classifier|classification_head|lm_head|score)\.dense\.weight$", Kind.LINEAR),
    (r"(^|\.)(\w*classifier|classification_head|lm_head|score)\.dense\.bias$", Kind.BIAS),
    (r"head\.probe$", Kind.EMBEDDING),
    (r"(^|\.)(lm_head|score|\w*classifier|classification_head|qa_outputs|proj_out)(\.\w+)*$", Kind.HEAD),
    (r"(^|\.)(output_projection|embed_out|vocab_projector)(\.\w+)*$|(^|\.)head(\.fc)?\.(weight|bias)$", Kind.HEAD),
    (r"^fc\.(weight|bias)$|(^|\.)fc_out\.(weight|bias)$|cls\.predictions\.(decoder\.\w+|bias)$", Kind.HEAD),
    (r"cls\.seq_relationship", Kind.HEAD),
    (r"relative_attention_bias|relative_position_bias_table$", Kind.EMBEDDING),
    (r"(class|cls|mask|distillation|position\w*|register|reg|separator)_(embeddings?|tokens?)$", Kind.EMBEDDING),
    (r"(^|\.)(shared|wte|wpe|embed|embed_in|embed_tokens|embed_positions|word_embeddings)\.weight$", Kind.EMBEDDING),
    (r"(token|word|position|token_type|tok|pos)_?(embedding|embeddings|embed)(\.weight)?$", Kind.EMBEDDING),
    (r"embeddings?\.\w*(position|token|word|type)\w*(\.weight)?$", Kind.EMBEDDING),
    (r"(cls_token|pos_embed|dist_token|query_tokens|masked_spec_embed)$", Kind.EMBEDDING),
    (r"bias$", Kind.BIAS),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _PATTERNS)


def kind_of(name: str, shape: Sequence[int], *, is_float: bool = True) -> Kind:
    """Return a tensor's kind as its name and shape suggest."""
    if not is_float:
        return Kind.BUFFER
    lowered = name.lower()
    if lowered.endswith("attn.bias") and len(shape) >= 3:
        return Kind.BUFFER  # GPT-2's causal mask
    for pattern, kind in _COMPILED:
        if pattern.search(lowered):
            return kind
    numel = 1
    for size in shape:
        numel *= size
    if numel == 1:
        return Kind.SCALAR
    if len(shape) == 1:
        return Kind.BIAS
    if len(shape) >= 3:
        return Kind.LINEAR if "expert" in lowered and len(shape) == 3 else Kind.CONV
    return Kind.LINEAR


def fused_parts(name: str, shape: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
    """Return how a fused projection splits into the maps it is made of, or None for a single map.

    Only layouts that lie in contiguous blocks are known: per-head interleaving (GPT-NeoX, BLOOM) is left as stored.

    Args:
        name: tensor name.
        shape: as stored.

    Returns:
        The axis and the sizes along it.
    """
    lowered = name.lower()
    if not shape:
        return None
    if re.search(r"(^|\.)in_proj_(weight|bias)$|attn\.qkv\.(weight|bias)$", lowered) and shape[0] % 3 == 0:
        return 0, (shape[0] // 3,) * 3
    if re.search(r"attn\.c_attn\.weight$", lowered) and len(shape) == 2:
        # GPT-2 stores in x out, Qwen the other way round; a square rest tells them apart.
        for axis in (0, 1):
            if shape[axis] == 3 * shape[1 - axis]:
                return axis, (shape[axis] // 3,) * 3
    if re.search(r"attn\.c_attn\.bias$", lowered) and len(shape) == 1 and shape[0] % 3 == 0:
        return 0, (shape[0] // 3,) * 3
    if re.search(r"mlp\.gate_up_proj\.weight$", lowered) and len(shape) == 2 and shape[0] % 2 == 0:
        return 0, (shape[0] // 2,) * 2
    return None


def find_prefix(base: Iterable[str], tuned: Iterable[str]) -> tuple[str, str] | None:
    """Find how the names of a body saved alone and of the same body under a head correspond.

    Args:
        base: names in the base.
        tuned: names in the tuned checkpoint.

    Returns:
        (to strip from a base name, to put before it) such that most base names are found; None if they agree as they
        are, or nothing helps.
    """
    base, tuned = list(base), set(tuned)

    def found(strip: str, add: str) -> int:
        return sum(name.startswith(strip) and add + name[len(strip) :] in tuned for name in base)

    as_they_are = found("", "")
    if 2 * as_they_are >= len(base):
        return None
    heads = {name.partition(".")[0] + "." for name in tuned if "." in name}
    candidates = [("", head) for head in sorted(heads)]
    candidates += [(head, "") for head in sorted({name.partition(".")[0] + "." for name in base if "." in name})]
    best = max(candidates, key=lambda pair: found(*pair), default=("", ""))
    return best if found(*best) > max(as_they_are, len(base) // 2) else None
