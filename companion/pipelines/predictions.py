"""What an expression in a sampling loop is: a denoiser's output, a branch of it, or both branches combined.

It knows how diffusers' loops cut a stacked batch, reshape, rescale and negate a prediction, and the ways in which they
write `u + s (c - u)`. `layout` follows a loop's statements with it.
"""

import ast
from dataclasses import dataclass, replace

# What may be done to a prediction on its way without changing what it means.
RECAST = frozenset(("float", "to", "type", "contiguous", "clone"))
_RESHAPED = frozenset(
    ("squeeze", "unsqueeze", "reshape", "view", "permute", "transpose", "flatten", "unflatten", "movedim")
)
_REARRANGEMENTS = ("unpack", "pack", "patchify", "rearrange")
_RESCALINGS = ("rescale_noise_cfg", "rescale_cfg")
_NOISE = frozenset(("latents", "sigma", "sigmas", "t", "timestep", "c_skip", "c_out", "sample", "latent_model_input"))


@dataclass(frozen=True)
class Output:
    """A variable that holds a denoiser's output, or a part of it.

    Args:
        trailing: it is without its first tokens or frames (dimension 1).
        arranged: its dimensions may be others than the network's.
    """

    site: int
    sign: int = 1
    half: int | None = None
    trailing: bool = False
    arranged: bool = False


@dataclass(frozen=True)
class Guided:
    """A variable that holds the combination of both branches.

    Args:
        trailing, arranged: see `Output`.
        clean: a name from which it was subtracted, which makes a prediction of x_0 a velocity.
    """

    sign: int = 1
    trailing: bool = False
    arranged: bool = False
    clean: str | None = None


@dataclass(frozen=True)
class Combination:
    """The two branches of a guided prediction, and how much of their difference is in it.

    Args:
        unguided: the scale at which the prediction is the conditional one.
    """

    conditional: Output
    reference: Output
    scale: ast.expr
    unguided: int


Value = Output | Guided
Names = dict[str, Value]


def combination_of(node: ast.expr, names: Names) -> Combination | None:
    """`u + s * (c - u)`, `c + s * (c - u)`, `s * c + (1 - s) * u`, `(s + 1) * c - s * u` or `torch.lerp(u, c, s)`."""
    match node:
        case ast.BinOp(
            left=ast.BinOp(left=scale, op=ast.Mult(), right=one),
            op=ast.Add(),
            right=ast.BinOp(
                left=ast.BinOp(left=ast.Constant(value=1), op=ast.Sub(), right=rest), op=ast.Mult(), right=other
            ),
        ) if ast.dump(scale) == ast.dump(rest):
            found = _branches(one, other, names)
            return None if found is None else Combination(*found, scale, 1)
        case ast.BinOp(left=base, op=ast.Add(), right=ast.BinOp(left=one, op=ast.Mult(), right=other)):
            for difference, scale in ((one, other), (other, one)):
                if isinstance(difference, ast.BinOp) and isinstance(difference.op, ast.Sub):
                    found = _branches(difference.left, difference.right, names)
                    start = value_of(base, names)
                    if found is not None and start in found:
                        return Combination(*found, scale, 1 if start == found[1] else 0)
        case ast.BinOp(
            left=ast.BinOp(op=ast.Mult(), right=one),
            op=ast.Sub(),
            right=ast.BinOp(left=scale, op=ast.Mult(), right=other),
        ):
            found = _branches(one, other, names)
            return None if found is None else Combination(*found, scale, 0)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="lerp"), args=[start, end, scale]):
            found = _branches(end, start, names)
            return None if found is None else Combination(*found, scale, 1)
    return None


def _branches(conditional: ast.expr, reference: ast.expr, names: Names) -> tuple[Output, Output] | None:
    """Two different outputs of the denoiser, if these are."""
    c, u = value_of(conditional, names), value_of(reference, names)
    return (c, u) if isinstance(c, Output) and isinstance(u, Output) and c != u else None


def value_of(node: ast.expr, names: Names) -> Value | None:
    """What an expression is, if it is a prediction but for its dtype, sign or arrangement."""
    match node:
        case ast.Name(id=name):
            return names.get(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = value_of(operand, names)
            return None if value is None else replace(value, sign=-value.sign)
        case ast.Call(func=ast.Attribute(value=owner, attr=method)) if method in RECAST:
            return value_of(owner, names)
        case ast.Call(func=ast.Attribute(value=owner, attr=method)) if method in _RESHAPED:
            return _arranged(value_of(owner, names))
        case ast.Call(func=ast.Attribute(value=owner, attr="clip" | "clamp")):
            value = value_of(owner, names)
            return value if isinstance(value, Guided) else None
        case ast.Call(func=ast.Attribute(attr=method), args=[first, *_]) if (
            any(word in method for word in _REARRANGEMENTS) or method in _RESCALINGS
        ):
            return _arranged(value_of(first, names))
        case ast.Call(func=ast.Name(id=function), args=[first, *_]) if function in _RESCALINGS:
            return value_of(first, names)
        case ast.Call(func=ast.Name(id="list" | "tuple"), args=[first]):
            return value_of(first, names)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="stack" | "cat"), args=[first, *_]):
            # Both halves of a stacked batch may be given the same guided prediction; others may be joined behind it.
            if isinstance(first, (ast.List, ast.Tuple)):
                return value_of(first.elts[0], names)
            return value_of(first, names)
        case ast.ListComp(elt=element, generators=[ast.comprehension(target=ast.Name(id=item), iter=iterated)]):
            value = value_of(iterated, names)
            return None if value is None else value_of(element, {item: value})
        case ast.Subscript(value=owner, slice=index):
            return _part(owner, index, names)
        case ast.BinOp(left=ast.BinOp(left=ast.Name(id=start), op=ast.Sub(), right=right), op=ast.Div()):
            value = value_of(right, names)  # a flow's velocity ε - x_0 is (z - x_0)/σ
            return replace(value, clean=start) if isinstance(value, Guided) and value.clean is None else None
        case ast.BinOp(left=left, op=ast.Mult(), right=factor):
            value = value_of(left, names)  # comb_pred * (cond_norm / noise_norm): guidance made smaller, still guidance
            return value if isinstance(value, Guided) and not free_names(factor) & _NOISE else None
        case ast.BinOp(left=left, op=ast.Add(), right=ast.BinOp(op=ast.Mult()) as term):
            # more guidance on top of guidance, or two scalings of it mixed
            value = value_of(left, names)
            more = any(map(_is_difference, ast.walk(term))) or value_of(term.right, names) == value
            known = not free_names(term) & _NOISE
            return value if isinstance(value, Guided) and more and known else None
        case ast.IfExp(body=body, orelse=otherwise):
            return value_of(body, names) or value_of(otherwise, names)
    return None


def _arranged(value: Value | None) -> Value | None:
    return None if value is None else replace(value, arranged=True)


def _part(owner: ast.expr, index: ast.expr, names: Names) -> Value | None:
    value = value_of(owner, names)
    if value is None:
        pieces = halves_of(owner, names)  # noise_pred.chunk(2, dim=1)[0]
        if pieces is not None and isinstance(index, ast.Constant) and isinstance(index.value, int):
            return pieces[index.value]
        return None
    if isinstance(index, ast.Tuple):  # leading channels or tokens
        leading = all(
            _is_ellipsis(item) or (isinstance(item, ast.Slice) and item.lower is None and item.step is None)
            for item in index.elts
        )
        if leading and (_is_ellipsis(index.elts[0]) or _whole(index.elts[0])):
            return value
        match index.elts:
            case [batch, ast.Slice(lower=ast.expr(), upper=None, step=None), *others] if _whole(batch):
                known = all(map(_whole, others)) and not value.arranged
                return replace(value, trailing=True) if known else None
        return None
    if isinstance(index, ast.Slice) and index.step is None and isinstance(value, Output) and value.half is None:
        if index.lower is None and index.upper is not None:
            return replace(value, half=0)
        if index.upper is None and index.lower is not None:
            return replace(value, half=1)
    return value if isinstance(index, ast.Name) else None


def halves_of(node: ast.expr, names: Names) -> list[Value | None] | None:
    """The parts of `x.chunk(2)`, `torch.split(x, ...)` and the like: branches along the batch, else a leading part."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    if node.func.attr not in ("chunk", "split", "unbind", "tensor_split"):
        return None
    arguments = list(node.args)
    if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
        owner = arguments.pop(0)
    else:
        owner = node.func.value
    value = value_of(owner, names)
    if value is None:
        return None
    given = [keyword.value for keyword in node.keywords if keyword.arg == "dim"] + arguments[1:2]
    along = given[0].value if given and isinstance(given[0], ast.Constant) else (None if given else 0)
    if along == 0 and isinstance(value, Guided):  # given to both halves before
        return [value, value]
    if along == 0:
        count = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else 2
        if isinstance(value, Output) and value.half is None and count == 2:
            return [replace(value, half=0), replace(value, half=1)]
        return None
    return [value, None]  # learned variance and the like are left aside


def _is_ellipsis(item: ast.expr) -> bool:
    return isinstance(item, ast.Constant) and item.value is Ellipsis


def _whole(item: ast.expr) -> bool:
    return isinstance(item, ast.Slice) and item.lower is None and item.upper is None


def _is_difference(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)


def free_names(node: ast.AST) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
