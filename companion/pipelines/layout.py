"""How a diffusers pipeline does its guidance, read from the text of its own `__call__`.

Diffusers has some 170 pipelines with classifier-free guidance and no common interface for it: which branch of a
stacked batch comes first, whether the branches are two calls, how guidance is switched on, what becomes of the
prediction before the scheduler sees it, all this is in each class's sampling loop. The loops are written alike, though,
so they can be read: this module follows the denoiser's output through the statements of the loop to the combination
`u + s (c - u)` (or `c + s (c - u)`), and on to `scheduler.step`; `predictions` reads the expressions. A statement it
does not know ends in a refusal that quotes it. Nothing is guessed from names, batch sizes or the order of arguments.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any, Literal, NoReturn

from companion.pipelines.predictions import (
    RECAST,
    Combination,
    Guided,
    Names,
    Output,
    Value,
    combination_of,
    free_names,
    halves_of,
    value_of,
)

Role = Literal["stacked", "conditional", "reference", "other"]

SAMPLE_NAMES = ("hidden_states", "sample", "x")
_NOT_DENOISERS = ("controlnet", "vae", "image_encoder", "text_encoder", "adapter", "scheduler", "image_processor")
_METHODS = ("_", "get_")  # beginnings of names that are no component's


@dataclass(frozen=True)
class CallSite:
    """One call of a denoiser in the source: its lines, and the branch it evaluates."""

    first_line: int
    last_line: int
    role: Role


@dataclass(frozen=True)
class GuidanceLayout:
    """The guidance of one pipeline class.

    Args:
        mechanism: `stacked`: one call on both branches; `per_branch`: one call each.
        components: attribute names of the denoisers (some pipelines have one for high and one for low noise).
        controls: attribute names of the control networks that the loop calls.
        scheduler: attribute name of the scheduler.
        reference_first: `stacked`: whether the batch is [reference, conditional]; `per_branch`: whether the reference
            is called first.
        sites: the denoiser calls of the loop.
        sign: -1 where the pipeline negates the network's output before its scheduler sees it, else 1.
        trailing: whether the latents are the last, not the first tokens or frames (dimension 1) of the sample.
        clean: whether the network predicts x_0, which the pipeline makes a flow's velocity.
        guided: expressions, and what each must be, under which the two branches are combined.
        scale: the guidance scale, as an expression; None where it is made up only after the network was called.
        unguided: the scale at which there is no guidance: 1 of `u + s (c - u)`, 0 of `c + s (c - u)`.
        timestep, latents: what the scheduler's `step` is given, as expressions.
        timesteps: what the loop runs over, as an expression.
    """

    mechanism: Literal["stacked", "per_branch"]
    components: tuple[str, ...]
    controls: tuple[str, ...]
    scheduler: str
    reference_first: bool
    sites: tuple[CallSite, ...]
    sign: int
    trailing: bool
    clean: bool
    guided: tuple[tuple[CodeType, bool], ...]
    scale: CodeType | None
    unguided: int
    timestep: CodeType
    latents: CodeType
    timesteps: CodeType | None

    def role(self, line: int) -> Role:
        """Of the denoiser call that runs on this line of the source file."""
        for site in self.sites:
            if site.first_line <= line <= site.last_line:
                return site.role
        return "other"


class UnsupportedPipeline(ValueError):
    """Why a pipeline cannot be rectified; `kind` is `unguided` where there is nothing to rectify."""

    def __init__(self, reason: str, kind: Literal["unguided", "unknown"] = "unknown") -> None:
        super().__init__(reason)
        self.kind = kind


@cache
def guidance_layout(pipeline: type) -> GuidanceLayout:
    """How a pipeline class lays out its guidance.

    Raises:
        UnsupportedPipeline: its `__call__` does no classifier-free guidance, or does it in a way that is not
            understood; the message says which and why.
    """
    try:
        call = inspect.unwrap(pipeline.__call__)
        lines, first = inspect.getsourcelines(call)
    except (OSError, TypeError) as error:
        raise UnsupportedPipeline(f"the source of {pipeline.__name__}.__call__ cannot be read: {error}") from error
    [function] = ast.parse(textwrap.dedent("".join(lines))).body
    ast.increment_lineno(function, first - 1)
    assert isinstance(function, ast.FunctionDef)
    return read_call(function)


def call_code(pipeline: type) -> CodeType:
    """The code object of the class's `__call__`, by which a running call is recognised."""
    return inspect.unwrap(pipeline.__call__).__code__


# ------------------------------------------------------------------------------------------------- reading the source


@dataclass
class _Reading:
    """What has been found so far."""

    sites: list[ast.Call] = field(default_factory=list)
    components: list[str] = field(default_factory=list)
    combinations: list[tuple[Combination, tuple[tuple[ast.expr, bool], ...], ast.stmt]] = field(default_factory=list)
    steps: list[tuple[ast.Call, Value]] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    unknown: str | None = None


def read_call(function: ast.FunctionDef) -> GuidanceLayout:
    """The layout of a `__call__` given as a syntax tree with the line numbers of its file; see `guidance_layout`."""
    loop, reading = _guided_loop(function)
    if not reading.combinations:
        _refuse_without_combination(function, loop, reading)
    first, *others = reading.combinations
    combination, guided, combined = first
    conditional, reference = combination.conditional, combination.reference
    if any((other.conditional, other.reference) != (conditional, reference) for other, _, _ in others):
        raise UnsupportedPipeline("it combines branches in more than one way")
    if reading.unknown:
        raise UnsupportedPipeline(f"its prediction goes through `{reading.unknown}`, which is not understood")
    stacked = conditional.site == reference.site
    if stacked and {conditional.half, reference.half} != {0, 1}:
        raise UnsupportedPipeline("the two branches are not the halves of one batch")
    if not stacked and (conditional.half, reference.half) != (None, None):
        raise UnsupportedPipeline("it combines parts of different calls")
    steps = [(call, value) for call, value in reading.steps if _scheduler_of(call) is not None]
    if not steps:
        raise UnsupportedPipeline("the guided prediction does not reach its scheduler's step")
    step, value = steps[0]
    if any(keyword.arg == "per_token_timesteps" for keyword in step.keywords):
        raise UnsupportedPipeline("its tokens are at several noise levels at once, so K has no single coefficient")
    sign = value.sign * (conditional.sign if isinstance(value, Guided) else 1)
    timestep, latents = _argument(step, 1, "timestep"), _argument(step, 2, "sample")
    if timestep is None or latents is None:
        raise UnsupportedPipeline(f"`{ast.unparse(step)}` does not give the scheduler (prediction, timestep, sample)")
    if isinstance(value, Guided) and value.clean not in (None, ast.unparse(latents)):
        raise UnsupportedPipeline(f"its prediction is subtracted from `{value.clean}`, which is not understood")
    late = _assigned_between(loop, reading.sites[min(conditional.site, reference.site)], combined)
    shared = tuple((test, wanted) for test, wanted in guided if all(_contains(g, test, wanted) for _, g, _ in others))
    for test, _ in shared:
        if free_names(test) & late:
            raise UnsupportedPipeline(
                f"whether it guides, `{ast.unparse(test)}`, is decided only after the network was called"
            )
    scales = {(ast.dump(found.scale), found.unguided) for found, _, _ in reading.combinations}
    known = len(scales) == 1 and not free_names(combination.scale) & late
    roles: dict[int, Role] = (
        {conditional.site: "stacked"} if stacked else {conditional.site: "conditional", reference.site: "reference"}
    )
    return GuidanceLayout(
        mechanism="stacked" if stacked else "per_branch",
        components=tuple(dict.fromkeys(reading.components)),
        controls=tuple(dict.fromkeys(_called_controls(loop))),
        scheduler=str(_scheduler_of(step)),
        reference_first=reference.half == 0 if stacked else reference.site < conditional.site,
        sites=tuple(
            CallSite(call.lineno, call.end_lineno or call.lineno, roles.get(i, "other"))
            for i, call in enumerate(reading.sites)
        ),
        sign=sign,
        trailing=conditional.trailing or value.trailing,
        clean=isinstance(value, Guided) and value.clean is not None,
        guided=tuple((_compiled(test), wanted) for test, wanted in shared),
        scale=_compiled(combination.scale) if known else None,
        unguided=combination.unguided,
        timestep=_compiled(timestep),
        latents=_compiled(latents),
        timesteps=_loop_over(loop),
    )


def _called_controls(loop: ast.For) -> Iterator[str]:
    """Names of the control networks in `self.controlnet(...)`."""
    for node in ast.walk(loop):
        name = _component(node.func) if isinstance(node, ast.Call) else None
        if name is not None and "controlnet" in name and not name.startswith(_METHODS):
            yield name


def _refuse_without_combination(function: ast.FunctionDef, loop: ast.For, reading: _Reading) -> NoReturn:
    if _mentions(loop, ("self.guider",)):
        raise UnsupportedPipeline("its guidance is a guider component: give it a RectifiedGradientGuidance")
    distilled = UnsupportedPipeline(
        "its guidance_scale is an input of a distilled network; there are no branches", "unguided"
    )
    if not _mentions(loop, ("guid", "cfg", "uncond", "neg")):
        if _mentions(function, ("guidance_scale",)):
            raise distilled
        raise UnsupportedPipeline("it does no classifier-free guidance", "unguided")
    if any(map(_is_own_method_with_scale, ast.walk(loop))):
        raise UnsupportedPipeline("it combines its branches in a method of its own, outside its __call__")
    if _mentions(loop, ("do_classifier_free_guidance", "do_true_cfg", "uncond", "neg")):
        if reading.unknown:
            raise UnsupportedPipeline(f"its prediction goes through `{reading.unknown}`, which is not understood")
        raise UnsupportedPipeline("its branches are not combined as u + s (c - u) in its sampling loop")
    raise distilled


def _is_own_method_with_scale(node: ast.AST) -> bool:
    """`self._get_noise_pred(..., guidance_scale, ...)`."""
    if not isinstance(node, ast.Call):
        return False
    name = _component(node.func)
    given = {keyword.value.id for keyword in node.keywords if isinstance(keyword.value, ast.Name)} | {
        argument.id for argument in node.args if isinstance(argument, ast.Name)
    }
    return name is not None and name.startswith("_get_noise") and "guidance_scale" in given


def _guided_loop(function: ast.FunctionDef) -> tuple[ast.For, _Reading]:
    """The one loop with a scheduler's step in which branches are combined; the last such loop where none is guided."""
    loops = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.For)
        and any(isinstance(call, ast.Call) and _scheduler_of(call) is not None for call in ast.walk(node))
    ]
    if not loops:
        if _mentions(function, ("guidance_scale", "guider")):
            raise UnsupportedPipeline("its sampling loop is not in its __call__")
        raise UnsupportedPipeline("it has no sampling loop with a scheduler", "unguided")
    inner = [loop for loop in loops if not any(other is not loop and other in ast.walk(loop) for other in loops)]
    read = [(loop, _Reading(aliases=_aliases(function))) for loop in inner]
    for loop, reading in read:
        _read_block(loop.body, {}, (), reading)
    guided = [(loop, reading) for loop, reading in read if reading.combinations]
    if len(guided) > 1:
        raise UnsupportedPipeline(f"it guides in {len(guided)} sampling loops, and only one could be rectified")
    return guided[0] if guided else read[-1]


def _scheduler_of(call: ast.Call) -> str | None:
    """Name of the scheduler in `self.scheduler.step(...)`."""
    function = call.func
    if not (isinstance(function, ast.Attribute) and function.attr == "step"):
        return None
    owner = function.value
    if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self":
        return owner.attr if "scheduler" in owner.attr else None
    return None


def _aliases(function: ast.FunctionDef) -> dict[str, list[str]]:
    """Local names of components: `current_model = self.transformer`."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            component = _component(node.value)
            if component is not None:
                found.setdefault(node.targets[0].id, []).append(component)
    return found


def _component(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _denoiser_call(node: ast.expr, reading: _Reading) -> tuple[ast.Call, list[str]] | None:
    """The call in `self.transformer(...)[0]`, `self.unet(...).sample` or the like, and the components it may be of."""
    while True:
        match node:
            case ast.Subscript(value=inner) | ast.Attribute(value=inner):
                node = inner
            case ast.Call(func=ast.Attribute(value=inner, attr=method)) if method in RECAST:
                node = inner
            case _:
                break
    if not isinstance(node, ast.Call):
        return None
    component = _component(node.func)
    names = [component] if component else []
    if isinstance(node.func, ast.Name):
        names = reading.aliases.get(node.func.id, [])
    if not names or any(name.startswith(_METHODS) or part in name for name in names for part in _NOT_DENOISERS):
        return None
    given = {keyword.arg for keyword in node.keywords}
    timed = any(name and "timestep" in name for name in given) or len(node.args) >= 2
    sampled = bool(node.args) or bool(given & set(SAMPLE_NAMES))
    return (node, names) if timed and sampled else None


def _read_block(
    statements: list[ast.stmt], names: Names, guards: tuple[tuple[ast.expr, bool], ...], reading: _Reading
) -> None:
    """Follow the denoiser's output through statements; `names` is changed in place."""
    for statement in statements:
        if isinstance(statement, ast.If):
            then, otherwise = dict(names), dict(names)
            _read_block(statement.body, then, (*guards, (statement.test, True)), reading)
            _read_block(statement.orelse, otherwise, (*guards, (statement.test, False)), reading)
            for name in {**otherwise, **then}:
                values = [branch[name] for branch in (then, otherwise) if name in branch]
                names[name] = next((value for value in values if isinstance(value, Guided)), values[0])
        elif isinstance(statement, (ast.With, ast.For)):
            _read_block(statement.body, names, guards, reading)
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            _read_assignment(statement, statement.targets[0], statement.value, names, guards, reading)
        elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
            if isinstance(statement.target, ast.Name) and statement.target.id in names:
                reading.unknown = reading.unknown or ast.unparse(statement)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            if isinstance(call.func, ast.Attribute) and call.func.attr == "append" and call.args:
                value = value_of(call.args[0], names)
                if value is not None and isinstance(call.func.value, ast.Name):
                    names[call.func.value.id] = value


def _read_assignment(
    statement: ast.Assign,
    target: ast.expr,
    source: ast.expr,
    names: Names,
    guards: tuple[tuple[ast.expr, bool], ...],
    reading: _Reading,
) -> None:
    for call in (node for node in ast.walk(source) if isinstance(node, ast.Call)):
        if _scheduler_of(call) is not None and call.args:
            value = value_of(call.args[0], names)
            if value is not None:
                reading.steps.append((call, value))
            _assign(target, None, names)
            return
    if isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple) and len(target.elts) == len(source.elts):
        values = [value_of(item, names) for item in source.elts]
        for item, value in zip(target.elts, values, strict=True):
            _assign(item, value, names)
        return
    denoiser = _denoiser_call(source, reading)
    if denoiser is not None:
        reading.sites.append(denoiser[0])
        reading.components.extend(denoiser[1])
        first = target.elts[0] if isinstance(target, ast.Tuple) else target
        _assign(first, Output(len(reading.sites) - 1), names)
        return
    combination = combination_of(source, names)
    if combination is not None:
        reading.combinations.append((combination, guards, statement))
        _assign(target, Guided(), names)
        return
    halves = halves_of(source, names)
    if halves is not None and isinstance(target, ast.Tuple) and len(target.elts) == len(halves):
        for item, value in zip(target.elts, halves, strict=True):
            _assign(item, value, names)
        return
    value = value_of(source, names)
    rewritten = free_names(target) & set(names) and free_names(source) & set(names)
    if value is None and rewritten and not isinstance(target, (ast.Subscript, ast.Attribute)):
        # A rewritten prediction that is not understood; what is merely computed from one (a norm, a preview) is not.
        reading.unknown = reading.unknown or ast.unparse(statement)
        return
    _assign(target, value, names)


def _assign(target: ast.expr, value: Value | None, names: Names) -> None:
    if not isinstance(target, ast.Name):
        return
    if value is None:
        names.pop(target.id, None)
    else:
        names[target.id] = value


def _assigned_between(loop: ast.For, call: ast.Call, combination: ast.stmt) -> set[str]:
    """Names that the loop's body sets behind a call, before a statement."""
    first, last = call.end_lineno or call.lineno, combination.lineno
    behind = [node for node in ast.walk(loop) if isinstance(node, ast.Assign) and first < node.lineno < last]
    names = [name for node in behind for target in node.targets for name in ast.walk(target)]
    return {name.id for name in names if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def _argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    """An argument of a call, by its place or its name."""
    if len(call.args) > place:
        return call.args[place]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _contains(guards: tuple[tuple[ast.expr, bool], ...], test: ast.expr, wanted: bool) -> bool:
    return any(ast.dump(test) == ast.dump(other) and wanted == value for other, value in guards)


def _mentions(function: ast.AST, words: tuple[str, ...]) -> bool:
    text = ast.unparse(function)
    return any(word in text for word in words)


def _compiled(node: ast.expr) -> CodeType:
    return compile(ast.Expression(node), "<pipeline>", "eval")


def _loop_over(loop: ast.For) -> CodeType | None:
    """What a loop runs over: `timesteps` of `enumerate(timesteps)` or `self.progress_bar(timesteps)`."""
    iterated = loop.iter
    while isinstance(iterated, ast.Call) and iterated.args:
        iterated = iterated.args[0]
    return _compiled(iterated) if isinstance(iterated, (ast.Name, ast.Attribute)) else None


def evaluate(code: CodeType, frame: Any) -> Any:
    """An expression of a pipeline's source, in the frame of its running `__call__`."""
    return eval(code, frame.f_globals, frame.f_locals)
