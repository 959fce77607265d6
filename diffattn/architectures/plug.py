"""Puts a method into a diffusers processor without touching what surrounds its attention.

Every processor of diffusers projects, normalises, rotates and gates in code of its own, and between them calls one
function: `F.scaled_dot_product_attention` or `dispatch_attention_fn`. A plugged processor is an instance of a subclass
whose `__call__` is compiled from the same source, with that one call handed to `LayerPlug` instead:

    F.scaled_dot_product_attention(query, key, value, ...)
    self.diffattn.attend(F.scaled_dot_product_attention, True, attn, hidden_states, query, key, value, ...)

It runs with the globals of the processor's own module, under the file name and the line numbers of the original, so
that nothing of diffusers is copied or changed, and tracebacks point to diffusers. It shares the attributes of the
processor it replaces, and passes for an instance of its class.
"""

import __future__

import ast
import copy
import inspect
import re
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Self, cast

from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from diffattn.architectures.layer_plug import LayerPlug
from diffattn.architectures.run_state import NotPickled

HEADS_FIRST = {
    "F.scaled_dot_product_attention": True,
    "torch.nn.functional.scaled_dot_product_attention": True,
    "dispatch_attention_fn": False,
}
"""The functions that processors call -> whether heads come before tokens, [B, H, N, D] rather than [B, N, H, D]."""

OTHER_KEYS = re.compile(r"ip_|img|image")
"""Names of keys that are not the layer's own tokens: those of an image prompt."""

STAND_INS: dict[type, type] = {
    **dict.fromkeys((AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor), AttnProcessor2_0),
    **dict.fromkeys((AttnAddedKVProcessor, SlicedAttnAddedKVProcessor), AttnAddedKVProcessor2_0),
}
"""Processors that call neither function -> one that computes the same and does. The original runs in calls that the
method cannot take; where exact attention only proves faster or closer, this one does."""

CACHE = "kv_cache"
"""The argument of processors that passes a cache of keys and values."""

SLOT = "diffattn"
"""The attribute of a plugged processor that holds its `LayerPlug`."""


class PluggedError(Exception):
    """A processor that cannot be plugged; the message is the reason."""


def reason_unplugged(processor: Any) -> str | None:
    """Why a processor cannot be plugged, or None."""
    kind = type(genuine(processor))
    try:
        plugged_class(kind)
    except PluggedError as error:
        return str(error)
    return None


def plug_in(plug: LayerPlug) -> Any:
    """The processor that runs `plug` in place of the attention of `plug.original`.

    Raises:
        PluggedError: see `reason_unplugged`.
    """
    kind = plugged_class(type(plug.original))
    return _instance(kind, plug)


def plug_of(processor: Any) -> LayerPlug | None:
    """What `plug_in` put into a processor; None for any other processor."""
    return inspect.getattr_static(type(processor), SLOT).__get__(processor) if _is_plugged(processor) else None


def genuine(processor: Any) -> Any:
    """The processor itself, or the original of one of ours that was reinstalled after its removal."""
    while (plug := plug_of(processor)) is not None and not plug.active:
        processor = plug.original
    return processor


def _is_plugged(processor: Any) -> bool:
    return issubclass(type(processor), _Plugged)


def _instance(kind: Any, plug: LayerPlug) -> Any:
    new = object.__new__(kind)
    if hasattr(plug.original, "__dict__"):
        object.__setattr__(new, "__dict__", plug.original.__dict__)
    inspect.getattr_static(kind, SLOT).__set__(new, plug)
    return new


class _Plugged:
    """What every plugged class has in addition to the class that it replaces."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the processor that it replaced if its patch was removed, and something else put it back since."""
        original = genuine(self)
        if original is not self:
            return original.__reduce_ex__(protocol)
        NotPickled.__reduce_ex__(self, protocol)  # type: ignore[arg-type]
        raise AssertionError

    def __copy__(self) -> Any:
        """A copy of the processor that it replaces."""
        plug = plug_of(self)
        assert plug is not None
        return copy.copy(plug.original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        plug = copy.deepcopy(plug_of(self), memo)  # with its patch, which refers to this processor again
        assert plug is not None
        return memo.setdefault(id(self), _instance(type(self), plug))


class _StandIn(type):
    """The type of plugged classes. Each compares equal to the class that it replaces, so that `type(processor) ==
    AttnProcessor2_0` holds as before."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[2]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[2])


@cache
def plugged_class(kind: type) -> type:
    """The subclass of a processor's class that is plugged."""
    call: Any = _plugged_call(STAND_INS.get(kind, kind))  # type: ignore[call-overload]
    if kind in STAND_INS:
        call = _standing_in(kind.__call__, call)
    elif CACHE in inspect.signature(getattr(kind, _method(kind))).parameters:
        call = _without_cache(kind.__call__, call)
    body = {
        "__slots__": (SLOT,),
        _method(kind): call,
        "__class__": property(lambda self: kind),  # what `processor.__class__` is compared with, or made from
        "__doc__": kind.__doc__,
        "__module__": __name__,
    }
    return _StandIn(f"Plugged{kind.__name__}", (_Plugged, kind), body)


def _standing_in(original: Any, plugged: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the original where the layer runs exact, and otherwise the plugged code of another class."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        will_run = self.diffattn.will_run(attn, hidden_states, encoder_hidden_states, attention_mask)
        run = plugged if will_run else original
        return run(self, attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    __call__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return __call__


def _without_cache(original: Callable[..., Any], plugged: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the original in calls that cache keys and values or use cached ones, and otherwise the plugged code."""

    @wraps(original)
    def __call__(self: Any, attn: Any = None, *args: Any, **kwargs: Any) -> Any:  # compilation needs some default
        if kwargs.get(CACHE) is None or getattr(kwargs[CACHE], "mode", None) == "skip":
            return plugged(self, attn, *args, **kwargs)
        self.diffattn.count_exact("keys and values of a cache")
        return original(self, attn, *args, **kwargs)

    return __call__


def _method(kind: type) -> str:
    """The name of the method that attends; a module with a `__call__` of its own is a processor like any other."""
    return "forward" if kind.__call__ is nn.Module.__call__ else "__call__"


def _plugged_call(kind: type) -> Callable[..., Any]:
    """`kind.__call__`, or the forward of a module, compiled again with its call of attention handed over."""
    function = inspect.getattr_static(kind, _method(kind), None)
    if not inspect.isfunction(function) or not kind.__module__.startswith("diffusers."):
        raise PluggedError(f"custom processor {kind.__name__}")
    if function.__code__.co_freevars:
        raise PluggedError(f"processor {kind.__name__}, whose code is a closure")
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError:
        raise PluggedError(f"processor {kind.__name__}, whose source code is not available") from None
    tree = ast.parse("if True:\n" + "".join(lines))  # below a header, so that every column stays the same
    definition = cast(ast.If, tree.body[0]).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    handing = _HandOver(definition)
    handing.visit(definition)
    if not handing.found:
        raise PluggedError(f"processor {kind.__name__}, which makes no call of attention that can be replaced")
    ast.increment_lineno(ast.fix_missing_locations(tree), first - 2)
    code, made = function.__code__, dict[str, Any]()
    flags = code.co_flags & __future__.annotations.compiler_flag  # whether its module leaves annotations unevaluated
    exec(compile(tree, code.co_filename, "exec", flags, dont_inherit=True), function.__globals__, made)
    plugged = made[definition.name]
    for name in ("__defaults__", "__kwdefaults__", "__annotations__", "__qualname__"):
        setattr(plugged, name, getattr(function, name))
    return plugged


class _HandOver(ast.NodeTransformer):
    """Rewrites the call of attention over the layer's own tokens, the first one whose keys are theirs; where there are
    alternatives, the first in each."""

    def __init__(self, definition: ast.FunctionDef) -> None:
        self.found = False
        names = [argument.arg for argument in definition.args.args]
        self._self, self._attn = names[0], names[1]
        self._input = "hidden_states" if "hidden_states" in names else None

    def visit_If(self, node: ast.If) -> ast.AST:
        before, found = self.found, []
        for branch in (node.body, node.orelse):
            self.found = before
            branch[:] = [self.visit(statement) for statement in branch]
            found.append(self.found)
        self.found = any(found)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if self.found or name not in HEADS_FIRST or not _are_own_keys(node):
            return node
        self.found = True
        plug = ast.Attribute(ast.Name(self._self, ast.Load()), SLOT, ast.Load())
        given = ast.Name(self._input, ast.Load()) if self._input else ast.Constant(None)
        leading = [node.func, ast.Constant(HEADS_FIRST[name]), ast.Name(self._attn, ast.Load()), given]
        attend = ast.copy_location(ast.Attribute(plug, "attend", ast.Load()), node.func)  # the line in tracebacks
        for keyword in node.keywords:
            keyword.arg = {"query": "q", "key": "k", "value": "v"}.get(str(keyword.arg), keyword.arg)
        return ast.copy_location(ast.Call(attend, [*leading, *node.args], node.keywords), node)


def _are_own_keys(node: ast.Call) -> bool:
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    keys = node.args[1] if len(node.args) > 1 else named.get("key")
    if keys is None or isinstance(keys, ast.Subscript):  # none, or some of the keys only
        return False
    causal = named.get("is_causal")
    if isinstance(causal, ast.Constant) and causal.value is True:  # of a text
        return False
    return not OTHER_KEYS.search(ast.unparse(keys))
