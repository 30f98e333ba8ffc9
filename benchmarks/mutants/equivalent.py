"""Mutants that mean the same as the original, and why."""

from __future__ import annotations

_SAME_SHAPE = "the replacement must have the shape of the original, so nothing else is left out"
_NUMBERS = "absorbs numbers, as absorb-number does"
_MARGINS = "the two are equal where they are used"
_GATHERED = "(x + y) + z = x + (y + z) whatever they are: it only says where that is done"
_LINEAR = "the two are of one kind wherever they meet"
_ROUNDING = "the same over the reals: float16 would be rounded once more"
_ANY_TERM = "(x + a) + b = x + (a + b), and the same of factors, also for a value a"
_SIZES = (
    "the shape emitted is that of the value replaced, which several dynamic sizes only make "
    "longer to spell; measured right with two of them"
)
_ONE_PIECE = "a concatenation of one piece has its piece's shape and dtype"
_FEWER = "only refuses more; right where it still applies"
_REASON = "only chooses which reason is reported"
_COST = "what it costs decides whether it is done, not what"
_NEGATED = "a - b = a + (-b) whatever they read: it only says where that is done"
# Mutants that mean the same as the original, or refuse more and are right where they apply:
# (function, change) -> the argument. Changes are spelled as the table prints them; "*" is any.
EQUIVALENT = {
    ("_flops", "*"): _COST, ("_dense", "*"): _COST,
    ("multiply_out_right", "_worthwhile(rw, product, product.right, left.shape[0])  ->  "
     "_worthwhile(rw, product, product.right, left.shape[1])"): _COST,
    ("multiply_out_left", "_worthwhile(rw, product, product.left, right.shape[1])  ->  "
     "_worthwhile(rw, product, product.left, right.shape[2])"): _COST,
    ("uniform", "return number if number in (0.0, 1.0) else None  ->  "
     "return number if number in (1.0, 1.0) else None"):
        f"a cast of a zero is not recognized any more: {_FEWER}",
    ("uniform", "if isinstance(op, (ops.Reshape, ops.Expand, ops.Permute, ops.Copy, ops.Detach)): "
     "return uniform(op.input, limit)  ->  if False: return uniform(op.input, limit)"):
        f"a view of a number is not recognized any more: {_FEWER}",
    ("_merge", "isinstance(inner.right, float) and isinstance(inner.left, Value)  ->  "
     "isinstance(inner.left, Value)"): _ANY_TERM,
    ("_merge", "isinstance(inner.right, float) and isinstance(inner.left, Value)  ->  "
     "isinstance(inner.right, float) or isinstance(inner.left, Value)"): _ANY_TERM,
    ("merge_casts", "rw.emit_like(outer, input=inner.input) if source != outer.dtype else "
     "inner.input  ->  rw.emit_like(outer, input=inner.input)"):
        "emits a cast to the dtype that the value has, which is the value",
    ("drop_view", "op.step == 1 and op.start in (0, None)  ->  op.start in (0, None)"): _SAME_SHAPE,
    ("drop_view", "rw.match(op.step == 1 and op.start in (0, None))  ->  "
     "rw.match(op.step == 1 and op.start in (1, None))"):
        f"no slice from 1 has the shape of its input: {_FEWER}",
    ("drop_view", "(0, None)  ->  (None, 0)"): "membership does not depend on the order",
    ("spell_out_shape", "rw.match(rw.root.target in (aten.reshape_as.default, aten.view_as.default"
     ", aten.expand_as.default))  ->  (nothing)"):
        "emits the same op with the same fields, whatever call it was spelled with",
    ("merge_permutes", "if dims == tuple(range(len(dims))): return inner.input  ->  "
     "if False: return inner.input"): "emits the identity permutation, which is the value",
    ("merge_reshapes", "if same_shape(shape, inner.input.shape): return inner.input  ->  "
     "if False: return inner.input"): "emits a reshape to the shape that the value has",
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "(nothing)"): _SIZES,
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "rw.match(not sum((not isinstance(size, int) for size in shape)) <= 1)"): _SIZES,
    ("merge_reshapes", "sum((not isinstance(size, int) for size in shape)) <= 1  ->  "
     "sum((not isinstance(size, int) for size in shape)) > 1"): _SIZES,
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "rw.match(sum((not isinstance(size, int) for size in shape)) <= 2)"): _SIZES,
    ("merge_reshapes", "not isinstance(size, int)  ->  isinstance(size, int)"): _SIZES,
    ("merge_reshapes", "rw.emit_like(outer, input=inner.input, shape=shape)  ->  "
     "rw.emit_like(outer, input=inner.input)"):
        "the shape that the reshape was called with does too",
    ("drop_single_cat", "_same_type(op.tensors[0], rw, op.out)  ->  op.tensors[0]"): _ONE_PIECE,
    ("drop_single_cat", "rw.match(len(op.tensors) == 1)  ->  (nothing)"): _SAME_SHAPE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and same_shape(value.shape, out.shape)  ->  "
     "value.dtype == out.dtype"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and same_shape(value.shape, out.shape)  ->  "
     "same_shape(value.shape, out.shape)"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and same_shape(value.shape, out.shape)  ->  "
     "value.dtype == out.dtype or same_shape(value.shape, out.shape)"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "rw.match(value.dtype == out.dtype and "
     "same_shape(value.shape, out.shape))  ->  (nothing)"): _ONE_PIECE,
    ("_extract[ops.Copy]", "rw.match(not getattr(op, 'train', False))  ->  "
     "rw.match(not getattr(op, 'train', True))"): f"a copy is refused: {_FEWER}",
    ("merged_axis", "for last in range(axis + 1, len(before)):  ->  "
     "for last in range(axis + 2, len(before)):"):
        f"two axes merged into one are not recognized any more: {_FEWER}",
    ("written", "isinstance(other, Value) or other != 0  ->  other != 0"):
        "a value is never equal to a number",
    ("merged_axis", "for last in range(axis + 1, len(before)):  ->  "
     "for last in range(axis + 1, len(after)):"):
        f"counts fewer axes, or those beyond the last once more: {_FEWER}",
    ("_merged", "(branch(op.left, source), branch(op.right, source))  ->  "
     "(branch(op.right, source), branch(op.left, source))"): "the sum is the same either way round",
    ("_merged", "not alone  ->  alone"): "what goes away only enters the estimate of costs",
    ("_merged", "if not alone or value.op is None: break  ->  if False: break"):
        "what goes away only enters the estimate of costs",
    ("_merged", "i + j  ->  i"): f"an identity in front is no branch any more: {_FEWER}",
    ("absorb_number: _absorb[ops.Slice]", "rw.decline(f'its input is computed by {describe(whole)}, "
     "which a scale and shift cannot enter')  ->  (nothing)"):
        "a number has no axis, so it enters the whole that is sliced",
    ("extract", "rw.require(not others, f'its output is also read by {reader}, which cannot take it "
     "in')  ->  (nothing)"):
        "what others read stays as it is: a cost, and right",
    ("into_conv", "conv.out  ->  conv.input"): "only enters the estimate of costs",
    ("_absorb[ops.Addmm]", "product.input.ndim - 1  ->  1 - product.input.ndim"):
        "axis 0 of one, or -1 of two: the last axis in both cases",
    ("scale_and_shift", "widen(self.bias)  ->  self.bias"): _ROUNDING,
    ("written", "widen(other)  ->  other"): _ROUNDING,
    ("written", "value.ndim - other.ndim  ->  value.ndim"):
        f"no vector lies along an axis behind the last one: {_FEWER}",
    ("into_linear", "widen(weight, shift)  ->  weight"): _ROUNDING,
    ("_extract[ops.Relu]", "rw.match(by.shift is None)  ->  (nothing)"):
        "extract refuses a shift that an activation reads before that",
    ("_steps", "if _pointwise(outer) or inner.dilation == reach: return (inner.dilation, ones, ones)"
     "  ->  if False: return (inner.dilation, ones, ones)"):
        "the general way, with zeros for the taps between, is right here too",
    ("_steps", "ones = (1,) * outer.rank  ->  ones = (1,) * inner.rank"): "both have as many axes",
    ("_plain", "left.input  ->  left.out"): "a convolution keeps the number of axes",
    ("compose_maps", "isinstance(outer, ops.Linear) and isinstance(inner, ops.Linear)"
     "  ->  isinstance(outer, ops.Linear) or isinstance(inner, ops.Linear)"): _LINEAR,
    ("compose_maps", "isinstance(outer, ops.Linear) and isinstance(inner, ops.Linear)"
     "  ->  isinstance(inner, ops.Linear)"): _LINEAR,
    ("compose_maps", "isinstance(outer, ops.Linear) and isinstance(inner, ops.Linear)"
     "  ->  isinstance(outer, ops.Linear)"): _LINEAR,
    ("merge_convolutions: compose_maps", "rw.require(inner.bias is None, f'{_named(outer)} pads with "
     "zeros where {_named(inner)} adds its bias')  ->  (nothing)"):
        "what calls it has taken the bias away",
    ("merge_convolutions", "rw.pays([outer, inner], folded)  ->  rw.pays([inner, inner], folded)"):
        "an estimate of costs",
    ("merge_convolutions", "rw.pays([outer, inner], folded)  ->  rw.pays([outer, outer], folded)"):
        "an estimate of costs",
    ("_grown", "has - had  ->  has"): f"refuses what has had any padding: {_FEWER}",
    ("_regrouped", "for stop in range(len(after), 0, -1):  ->  for stop in range(len(after), 1, -1):"):
        f"a bias along the first axis is not recognized: {_FEWER}",
    ("uniform", "if operand.node.op == 'get_attr': state = operand.builder.graph.states[str("
     "operand.node.target)] tensor = state.tensor if state.kind != 'constant' or not 0 < "
     "tensor.numel() <= limit or tensor.is_complex(): return None first = tensor.flatten()[0] return "
     "float(first) if bool((tensor == first).all()) else None  ->  if False: state = "
     "operand.builder.graph.states[str(operand.node.target)] tensor = state.tensor if state.kind != "
     "'constant' or not 0 < tensor.numel() <= limit or tensor.is_complex(): return None first = "
     "tensor.flatten()[0] return float(first) if bool((tensor == first).all()) else None"):
        f"a stored number is not recognized: {_FEWER}",
    ("_merge", "rw.match(rw.only_user(inner, outer) and inner.left.dtype == outer.out.dtype)  ->  "
     "rw.match(rw.only_user(inner, outer) and outer.left.dtype == outer.out.dtype)"):
        "a float makes a sum or product of integers floating in one step as in two",
    ("_merge", "rw.match(rw.only_user(inner, outer) and inner.left.dtype == outer.out.dtype)  ->  "
     "rw.match(rw.only_user(inner, outer) and inner.left.dtype == inner.out.dtype)"):
        "both results are floating, of the same width",
    ("_merge", "isinstance(outer.right, float) and outer.out.dtype.is_floating_point  ->  "
     "isinstance(outer.right, float)"): "with a float it is floating",
    ("collect_terms: written", "rw.match(isinstance(value, Value) and (not value.is_constant))  ->  "
     "(nothing)"): "what is scaled may as well be a parameter",
    ("absorb_number: _absorb[ops.Mean]", "rw.require(axis not in mean.dims, f'{describe(mean.out)} "
     "averages over the channels')  ->  rw.require(not axis not in mean.dims, f'{describe(mean.out)} "
     "averages over the channels')"): f"a number enters no mean any more: {_FEWER}",
    ("drop_key_bias: _unbiased", "isinstance(op, ops.Attention) and through  ->  "
     "isinstance(op, ops.Attention) or through"):
        "a key that averages values with a bias has that bias: found in more places, and right",
    ("fold_batch_norm: scale_out", "if not isinstance(factor, Value) or factor.ndim == 0: return "
     "times(self.weight, factor)  ->  if False: return times(self.weight, factor)"):
        "the scale of a norm is a vector",
    ("merge_region", "start == beside[0]  ->  start != beside[0]"): _REASON,
    ("_merged", "(torch.int64, torch.int32)  ->  (torch.int32, torch.int64)"):
        "membership does not depend on the order",
    ("starts", "isinstance(op, AFFINE) and len(seen) < 2 * LARGEST  ->  len(seen) < 2 * LARGEST"):
        "a start beyond what is affine is tried too, and declined for that",
    ("gather_terms", "(op.right, op.left)  ->  (op.left, op.right)"): _FEWER,
    ("_apart", "(a, b), (c, d) = (_range(left), _range(right))  ->  "
     "(a, b), (c, d) = (_range(left), _range(left))"): f"no slices are found to be apart: {_FEWER}",
    ("merge_region", "end.out.is_tensor and (not end.out.is_constant) and "
     "end.out.dtype.is_floating_point  ->  not end.out.is_constant and "
     "end.out.dtype.is_floating_point"): "every affine op computes a tensor",
    ("merge_region", "if beside is not None and start == beside[0]:  ->  "
     "if beside is not None and start == beside[1]:"): _REASON,
    ("margins", "size < 0  ->  size >= 0"):
        "takes crops in place of frames, and these merge rightly too: the kernel grows",
    ("merge_region", "best is None or saved > best[0]  ->  best is None"):
        "takes the first way that pays in place of the one that pays most",
    ("_merged", "rw.match(layout.inside == 1 or len(replaced) > 2)  ->  (nothing)"):
        "only says when a reshape is worth it",
    ("_merged", "looks_up or start.dtype == end.out.dtype  ->  start.dtype == end.out.dtype"):
        f"tables are not merged any more: {_FEWER}",
    ("merge_region: _beside", "*"): _REASON,
    ("merge_region: _joins_heads", "*"):
        "only decides whether another way is tried, with the conditions of the first one",
    ("_either", "-1  ->  1"): "there are two of them",
    ("merge_region: obstacle", "*"): _REASON,
    ("merge_region", "blocked = None if beside is None else obstacle(rw, beside[1], beside[0])  ->  "
     "blocked = None if beside is None else obstacle(rw, beside[1], beside[1])"): _REASON,
    ("merge_region: _framed_otherwise", "*"): _REASON,
    ("absorb_number", "rw.match(by.axis is None)  ->  (nothing)"):
        "absorbs vectors too, as fold-scale-shift does",
    ("scale_and_shift", "widen(self.running_var)  ->  self.running_var"): _ROUNDING,
    ("_grown", "has - had  ->  had - has"): f"refuses every growth: {_FEWER}",
    ("starts", "isinstance(op, AFFINE) and len(seen) < 2 * LARGEST  ->  "
     "isinstance(op, AFFINE) or len(seen) < 2 * LARGEST"):
        "a start beyond what is affine is tried too, and declined for that",
    ("gather_terms: _term", "*"): _GATHERED,
    ("gather_terms: _step", "*"): _GATHERED,
    ("gather_terms: written", "*"): _GATHERED,
    ("gather_terms: same_shape", "*"): _GATHERED,
    ("gather_terms: same", "*"): _GATHERED,
    ("gather_terms: total", "*"): _GATHERED,
    ("gather_terms: combined", "*"): _GATHERED,
    ("gather_terms: channel_vector", "*"): _GATHERED,
    ("gather_terms: scale_and_shift", "*"): _GATHERED,
    ("through_pad", "pad.value is None or pad.value == 0  ->  pad.value is None and pad.value == 0"):
        _FEWER,
    ("through_pool", "pool.input.ndim - pool.rank  ->  pool.rank - pool.input.ndim"): _FEWER,
    ("fold_batch_norm: _absorb[ops.Conv]", "conv.out_channels  ->  conv.in_channels"):
        "only counts the entries of a number, and the shift of a norm is a vector",
    ("fold_batch_norm", "norm.running_mean is not None and norm.running_var is not None  ->  "
     "norm.running_mean is not None or norm.running_var is not None"): "it has both or neither",
    ("response_kernel", "widen(self.scale_in(constant))  ->  self.scale_in(constant)"): _ROUNDING,
    ("fold_scale_shift", "rw.match(by.axis is not None)  ->  (nothing)"): _NUMBERS,
    ("fold_scale_shift", "rw.match(by.axis is not None)  ->  rw.match(not by.axis is not None)"):
        _NUMBERS,
    ("fold_scale_shift: written", "inverse = rw.emit(ops.Reciprocal(widen(other))) if isinstance("
     "other, Value) else 1 / other  ->  inverse = rw.emit(ops.Reciprocal(widen(other))) if "
     "isinstance(other, Value) else 2 / other"): "numbers are left to absorb-number",
    ("stack_concatenated: _features", "one.out.ndim - 1  ->  one.out.ndim"):
        f"linear maps are not recognized any more: {_FEWER}",
    ("stack_siblings: _alike", "return False  ->  return True"):
        "weights that are computed are stacked at every call: a cost, and right",
    ("absorb_number", "by.axis is None  ->  by.axis is not None"):
        "absorbs vectors in place of numbers, as fold-scale-shift does",
    ("_absorb[ops.Add]", "isinstance(op, ops.Add) and fixed(terms[0])  ->  isinstance(op, ops.Add)"):
        "a shift may enter with either term of a sum",
    ("written", "rw.match(len(axes) <= 1)  ->  rw.match(len(axes) <= 2)"):
        "what lies along two axes is no channel vector, and refused as that",
    ("keeps_sign", "scale is None or bool(scale > 0)  ->  scale is None"):
        f"no number passes a ReLU any more: {_FEWER}",
    ("drop_key_bias", "attention.key != attention.value and attention.key != attention.query  ->  "
     "attention.key != attention.value or attention.key != attention.query"):
        "a key that is also the query or the value is computed twice: a cost, and right",
    ("move_value_bias", "widen(outer.weight, bias)  ->  outer.weight"):
        "the other factor is widened, and a product has the wider dtype of the two",
    ("add_negative_branch: _meeting", "*"): _NEGATED,
    ("add_negative_branch: branch", "*"): _NEGATED,
    ("add_negative_branch: margins", "*"): _NEGATED,
    ("_grown", "type(count) is int  ->  type(count) is not int"): "emits a padding by no zeros",
    ("margins", "return (0,) * (rank - len(before)) + before[::-1]  ->  "
     "return (0,) * (rank - len(after)) + before[::-1]"): _MARGINS,
    ("margins", "return (0,) * (rank - len(before)) + before[::-1]  ->  "
     "return (0,) * (rank - len(before)) + after[::-1]"): _MARGINS,
    ("margins", "if len(before) > rank or before != after or any((size < 0 for size in before)):  ->  "
     "if len(after) > rank or before != after or any((size < 0 for size in before)):"): _MARGINS,
    ("margins", "if len(before) > rank or before != after or any((size < 0 for size in before)):  ->  "
     "if len(before) > rank or before != after or any((size < 0 for size in after)):"): _MARGINS,
    ("margins", "pad.input.ndim - 2  ->  2 - pad.input.ndim"): f"no frame is found: {_FEWER}",
    ("margins", "pad.input  ->  pad.out"): "padding keeps the number of axes, all it is for",
    ("through_pool", "pool.input  ->  pool.out"): "a pool keeps the number of axes, all it is for",
    ("through_pad", "pad.mode != 'constant' or (by.shift is None and (pad.value is None or "
     "pad.value == 0))  ->  pad.mode != 'constant' and (by.shift is None and (pad.value is None or "
     "pad.value == 0))"): f"both are demanded where one suffices: {_FEWER}",
    ("_absorb[ops.Copy]", "rw.require(not getattr(op, 'train', False), f'{describe(op.out)} drops "
     "at random')  ->  rw.require(not getattr(op, 'train', True), f'{describe(op.out)} drops at "
     "random')"): f"a copy is refused: {_FEWER}",
}  # fmt: skip
