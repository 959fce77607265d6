"""Agent attention, training-free (Han et al., "Agent Attention", ECCV 2024, arXiv 2312.08874, sec. 4.4), and corrected
(Xiong et al., "Nyströmformer", AAAI 2021).

Shapes: B batch, H heads, N tokens, n agents, D channels per head.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import agent_attention, match_tokens, merge_tokens, pool_tokens, unmerge_tokens
from diffattn.functional.landmark import MAX_DAMPING
from diffattn.methods.base import (
    AttentionFn,
    LayerCall,
    LayerSpec,
    Preset,
    TokenLayout,
    half_overflows,
    join_exact,
)
from diffattn.methods.landmarks import Landmarks
from diffattn.methods.limited import LimitedMethod
from diffattn.methods.options import check, is_int, is_number
from diffattn.methods.thresholds import Thresholds, below_smallest, load_thresholds, min_tokens_for
from diffattn.schedules import EXACT

AgentSource = Literal["pool", "merge", "landmarks"]
DEFAULT_SCALE_EXPONENT, DEFAULT_SHORTCUT = 0.3, 0.075
DEFAULT_AGENTS, DEFAULT_RATIO = 64, 31 / 32

AGENTS_BESIDE_CONTEXT, LEAST_RATIO_BESIDE_CONTEXT = 256, 15 / 16
"""Landmarks by default, if that is more, in joint attention: the tokens of a text cost as much anyway, and such heads
need more landmarks."""

TUNED_SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
"""Ratios of landmarks to tokens that tuning chooses from."""

TUNED_HEAD_ERROR = 0.5
"""What tuning sets as `max_head_error`: it measures the error of every layer itself."""

TUNED_POOLED = ((1 / 16, 1.0, 0.0), (1 / 16, 0.3, 0.075), (1 / 64, 1.0, 0.0), (1 / 64, 0.3, 0.075))
"""Pooled agents that tuning chooses from: ratio of agents to tokens, scale exponent, shortcut."""


@dataclass(frozen=True)
class AgentAttention(LimitedMethod):
    """Options of agent attention.

    The number of agents of a layer with N tokens is the larger of `num_agents` and (1 - `agent_ratio`)·N, whichever
    are given. If neither is, it is the larger of 64 and N/32; for landmarks in joint attention, together with tokens of
    a text, it is at least the smaller of 256 and N/16. A layer runs exact where agents cannot pay off: if 2·n >= N, or
    below `min_tokens`.
    """

    num_agents: int | None = None  # number of agents; with agent_ratio, the minimum
    agent_ratio: float | None = None  # share of tokens that do not become agents, in (0, 1)
    agents: AgentSource | None = None
    """"pool": average-pooled queries. "merge": tokens merged by similarity (the published recipe). "landmarks": tokens
    sampled from queries and keys, with a correction between the two steps; by far the closest to exact attention.
    None: landmarks, or pooled queries where `scale_exponent` or `shortcut` is given."""
    damping: float = 1e-5  # "landmarks": damping of the correction, in (0, 0.001]; more is smoother
    max_head_error: float | None = None
    """"landmarks": heads whose relative error, estimated on eight queries, exceeds this fall back to exact attention;
    the report counts them. Above 0; inf: none does. None: 0.1. A compiled denoiser is checked in an additional call."""
    calibrate_every: int = 8
    """"landmarks": how many calls of a layer, in one phase of a run, share the damping, trust and exact heads that the
    first of them determines. 1: every call determines its own, as with gradients and in a compiled denoiser."""
    merge_ratio: float = 0.4  # "merge": share of tokens merged away before attention, in [0, 1)
    merge_stride: int = 2  # "merge": one destination token per stride x stride cell
    scale_exponent: float | None = None  # κ: exponent on the scale of the broadcast softmax, in [0, 1]; None: 0.3
    shortcut: float | None = None  # share of each token's own value added to its output; None: 0.075
    min_tokens: int | None = None  # layers with fewer tokens run exact; None: as timed, else the device's threshold
    max_level: int | None = None  # deepest level that is accelerated, 0 is the highest resolution; None: all
    upcast: bool | None = None  # logits in fp32; None: where the layer asks for it and works in fp16

    name: ClassVar[str] = "agent"
    size_name: ClassVar[str | None] = "agents"
    presets: ClassVar[Mapping[str, Preset]] = {
        # Corrected agents, at every noise level.
        "balanced": Preset(),
        # A quarter of the agents of "balanced", and three times the error in a head.
        "fast": Preset(options={"num_agents": 16, "agent_ratio": 127 / 128, "max_head_error": 0.3}),
        # Pooled queries while the picture is noise; exact once detail appears.
        "pooled": Preset(
            options={"agents": "pool", "num_agents": 64, "agent_ratio": 63 / 64}, schedule={0.4: {}, 0.0: EXACT}
        ),
        # The published recipe for 512x512: agents in the first 40 % of the steps (noise level above 0.69 on
        # Stable Diffusion's schedule), then plain attention between merged tokens; highest resolution only.
        "paper": Preset(
            options={"agents": "merge", "merge_ratio": 0.4, "max_level": 0},
            schedule={
                0.69: {"merge_stride": 4, "agent_ratio": 0.95},
                0.0: {"merge_stride": 2, "agent_ratio": 0.5},
            },
        ),
    }

    def __post_init__(self) -> None:
        sources = get_args(AgentSource)
        check(self.agents in (*sources, None), "agents", self.agents, "'pool', 'merge' or 'landmarks', or None")
        check(
            self.num_agents is None or is_int(self.num_agents, 1), "num_agents", self.num_agents, "1 or more, or None"
        )
        ratio = self.agent_ratio
        check(ratio is None or (is_number(ratio) and 0 < ratio < 1), "agent_ratio", ratio, "above 0 and below 1")
        merged = self.merge_ratio
        check(is_number(merged) and 0 <= merged < 1, "merge_ratio", merged, "at least 0 and below 1")
        check(is_int(self.merge_stride, 2), "merge_stride", self.merge_stride, "a whole number, 2 or more")
        kappa, share = self.scale_exponent, self.shortcut
        check(kappa is None or (is_number(kappa) and 0 <= kappa <= 1), "scale_exponent", kappa, "a number from 0 to 1")
        check(share is None or is_number(share), "shortcut", share, "a finite number")
        if self.agents == "landmarks" and (kappa is not None or share is not None):
            raise ValueError("scale_exponent and shortcut belong to agents='pool' and 'merge'; landmarks have neither")
        damping = self.damping
        check(
            is_number(damping) and 0 < damping <= MAX_DAMPING,
            "damping",
            damping,
            f"a number above 0 and at most {MAX_DAMPING}",
        )
        error = self.max_head_error
        check(
            error is None or error == inf or (is_number(error) and error > 0),
            "max_head_error",
            error,
            "a number above 0, inf included, or None",
        )
        every = self.calibrate_every
        check(is_int(every, 1), "calibrate_every", every, "a whole number, 1 or more")
        self.check_limits()
        check(self.upcast is None or isinstance(self.upcast, bool), "upcast", self.upcast, "True, False or None")

    @classmethod
    def candidates(cls) -> Sequence[Mapping[str, Any]]:
        # min_tokens is 0 because tuning itself measures where agents pay off. The fewest landmarks are those of "fast".
        kind = {"agents": "landmarks", "max_head_error": TUNED_HEAD_ERROR}
        landmarks = [kind | cls._share(share) for share in TUNED_SHARES]
        landmarks.append({"min_tokens": 0} | dict(cls.presets["fast"].options) | kind)
        pooled = [
            cls._share(share) | {"scale_exponent": kappa, "shortcut": shortcut}
            for share, kappa, shortcut in TUNED_POOLED
        ]
        return landmarks + pooled

    @staticmethod
    def _share(share: float) -> dict[str, Any]:
        return {"num_agents": None, "agent_ratio": 1 - share, "min_tokens": 0}

    @classmethod
    def options_for_size(cls, size: int) -> Mapping[str, Any]:
        return {"num_agents": size, "agent_ratio": None, "min_tokens": 0}

    def size(self, num_tokens: int) -> int:
        return self.count(num_tokens)

    def out_of_range(self, given: Collection[str], num_tokens: int) -> str | None:
        asked = self.num_agents
        if asked is None or "num_agents" not in given or asked < num_tokens:
            return None
        most = num_tokens - 1 if self.source == "merge" else (num_tokens - 1) // 2
        allowed = f"allowed: 1 to {most}" if most else "which are too few for any number of agents"
        return f"num_agents={asked} is not below the {num_tokens} tokens of the largest layer at this size; {allowed}"

    @property
    def source(self) -> AgentSource:
        """The kind of agents, with None resolved."""
        if self.agents is not None:
            return self.agents
        return "landmarks" if self.scale_exponent is None and self.shortcut is None else "pool"

    @property
    def checks_heads(self) -> bool:
        return self.source == "landmarks" and self.max_head_error != inf

    @cached_property
    def _thresholds(self) -> Thresholds:
        return load_thresholds()

    def count(self, num_tokens: int, beside_context: bool = False) -> int:
        """The number of agents n of a layer with `num_tokens` tokens of the picture, before rounding to a grid.

        Args:
            num_tokens: N.
            beside_context: whether there are tokens without a position beside them.
        """
        least, ratio = self.num_agents, self.agent_ratio
        if least is not None or ratio is not None:
            return max(least or 1, 0 if ratio is None else _left(num_tokens, ratio))
        n = max(DEFAULT_AGENTS, _left(num_tokens, DEFAULT_RATIO))
        if not beside_context or self.source != "landmarks":
            return n
        return max(n, min(AGENTS_BESIDE_CONTEXT, _left(num_tokens, LEAST_RATIO_BESIDE_CONTEXT)))

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        n = self.count(num_tokens)
        if self.source == "merge":
            if mask_rows:
                return "masked: merged tokens cannot follow a mask"
            if num_tokens < self.merge_stride**2:
                return f"{num_tokens} tokens: less than one cell of {self.merge_stride}x{self.merge_stride}"
            return f"{n} agents for {num_tokens} tokens" if n >= num_tokens else None
        if reason := super().reason_call(layer, num_tokens, device, mask_rows):
            return reason
        return f"{n} agents for {num_tokens} tokens: agents pay below half the tokens" if 2 * n >= num_tokens else None

    def reason_slower(self, num_tokens: int, device: str) -> str | None:
        smallest = self.min_tokens
        if smallest is None:
            n = None if self.source == "merge" else self.count(num_tokens)
            smallest = min_tokens_for(self._thresholds, device, n)
        return below_smallest(smallest, num_tokens)

    def reason_layout(self, layout: TokenLayout) -> str | None:
        if self.source == "merge" or layout.is_plain:
            return super().reason_layout(layout)
        if self.source == "pool" and (layout.rotated or len(layout.grids) > 1 or len(layout.grid) != 2):
            return "rotated tokens, and those of several pictures or frames, cannot be averaged into pooled agents"
        n, context = self.count(layout.num_tokens, layout.has_context), layout.num_context
        if guard_or_true(2 * (n + context) < layout.num_tokens + context):
            return None
        return f"{n} agents and {context} tokens of context for {layout.num_tokens} of the picture: too many to pay off"

    def build(self, layer: LayerSpec) -> AttentionFn:
        _ = self._thresholds  # report a damaged table when patching, not in the middle of a run
        attend = {"pool": self._attend_pooled, "merge": self._attend_merged, "landmarks": self._landmarks}[self.source]

        def attention(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
            if self.upcast or (self.upcast is None and half_overflows(layer, q.dtype)):
                return attend(q.float(), k.float(), v.float(), call).to(v.dtype)
            return attend(q, k, v, call)

        return attention

    @property
    def _landmarks(self) -> Landmarks:
        return Landmarks(self.count, self.damping, self.max_head_error, self.calibrate_every)

    def _attend_pooled(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layout = call.layout
        image = layout.on_grid(q)
        agents = pool_tokens(image, layout.rows_and_columns, self.count(layout.num_tokens))  # [B, H, n, D]
        if not layout.num_context:
            return self._through(agents, q, k, v, call.mask)
        # The context is gathered from, but is no agent: its answers are not those of any part of the picture.
        out = agent_attention(image, k, v, agents, scale_exponent=self._kappa, shortcut=0, key_mask=call.mask)
        return join_exact(out.add(layout.on_grid(v), alpha=self._value_share), q, k, v, call)

    def _through(self, agents: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return agent_attention(q, k, v, agents, scale_exponent=self._kappa, shortcut=self._value_share, key_mask=mask)

    @property
    def _kappa(self) -> float:
        return DEFAULT_SCALE_EXPONENT if self.scale_exponent is None else self.scale_exponent

    @property
    def _value_share(self) -> float:
        """Of each token's own value."""
        return DEFAULT_SHORTCUT if self.shortcut is None else self.shortcut

    def _attend_merged(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        """Merging happens after the projections: an average commutes with a linear layer."""
        tokens = q.shape[2]
        grid = call.layout.rows_and_columns
        stride = (min(self.merge_stride, grid[0]), min(self.merge_stride, grid[1]))
        matching = match_tokens(k.transpose(1, 2).flatten(2) if call.x is None else call.x, grid, stride)
        merged = min(int(tokens * self.merge_ratio), matching.max_merged)
        left_out = min(tokens - self.count(tokens), matching.max_merged)
        mq, mk, mv = (merge_tokens(x, matching, merged) for x in (q, k, v))  # [B, H, N - r, D]
        if 2 * (tokens - left_out) < tokens - merged:
            agents = merge_tokens(q, matching, left_out)  # [B, H, n, D]
            out = self._through(agents, mq, mk, mv)
        else:
            out = scaled_dot_product_attention(mq, mk, mv)
        return unmerge_tokens(out, matching, merged)


def _left(num_tokens: int, ratio: float) -> int:
    """How many tokens are left of `num_tokens` without a share `ratio` of them."""
    return num_tokens - int(num_tokens * ratio)
