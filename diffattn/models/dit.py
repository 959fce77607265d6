"""One backbone for DiT (Peebles & Xie, ICCV 2023) and SiT (Ma et al., ECCV 2024), with a choice of attention per layer.

Shapes: B batch, c image channels, N = h·w tokens on a grid (h, w), C hidden channels, n mediators.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from diffattn.models import convert, convert_diffusers
from diffattn.models.attention import ATTENTION
from diffattn.models.attention_layer import AttentionOptions
from diffattn.models.config import (
    PATHS,
    attention_per_layer,
    check_num_mediators,
    check_one_of,
    check_widths,
    mediator_set,
    options_by_attention,
    token_grid,
)
from diffattn.models.initialize import initialize
from diffattn.models.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    TimestepEmbedder,
    position_embedding,
    unpatchify,
)
from diffattn.models.steps import projections, run_steps, steps_of


class DiT(ModelMixin, ConfigMixin):
    """A class-conditional diffusion transformer: `model(x, t, y).sample`.

    Args:
        sample_size: height and width of its images or latents, or one number for both. Other sizes run too:
            the position embedding is recomputed, position biases are resized.
        patch_size: side p of the square that becomes a token.
        in_channels: c.
        hidden_size: C, a multiple of `num_heads` and of 4.
        num_layers, num_heads: of the transformer.
        mlp_ratio: hidden width of the MLPs over C.
        num_classes: classes, with ids from 0.
        null_class: the id `num_classes` means "no class", which guidance needs.
        learn_sigma: twice the output channels, as official checkpoints have. A velocity model leaves the second half
            out of its output.
        prediction: "velocity" (SiT) or "epsilon" (DiT).
        time_direction: "noise_to_data": t from 0 (noise) to 1 (data), as SiT; "data_to_noise": t from 0 (data) to 999
            (noise), as DiT. Only used by samplers; t is passed to the embedder unchanged.
        path: "linear" or "gvp", the interpolant that a velocity model was trained on; also only used by samplers.
        attention: a name of `models.attention.ATTENTION`, such as "softmax", "mediator" or "inline", for all layers, or
            one name per layer.
        attention_options: name of an attention -> options of its own, such as {"focused_linear": {"power": 4}}.
        steps: progressive width, [[width, depth], …] up to `hidden_size` and `num_layers`, see `models.steps`.
        mediators: the numbers of mediators n that have position biases of their own: perfect squares.
        num_agents, agent_scale_exponent, agent_shortcut: of agent layers, see `functional.agent_attention`.
        qk_norm: RMS norm of queries and keys, per head.
        norm_eps: of the norm before each MLP.
        frequency_shift: time frequencies are 10000^(-i/(128 - shift)): 0 official, 1 diffusers.
        position_scale: positions count tokens times this; 1 is official. A model that starts from the weights of one
            of half its size keeps the meaning of their positions with half their scale.

    Raises:
        ValueError: naming the value that does not fit, and what is allowed.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012, as diffusers declares it
    _repeated_blocks = ["DiTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ("pos_embed", "norm")

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        learn_sigma: bool = False,
        prediction: str = "velocity",
        time_direction: str = "noise_to_data",
        path: str = "linear",
        attention: str | Sequence[str] = "softmax",
        mediators: Sequence[int] = (4, 16, 64),
        num_agents: int = 64,
        agent_scale_exponent: float = 0.3,
        agent_shortcut: float = 0.075,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        frequency_shift: float = 0.0,
        attention_options: Mapping[str, Mapping[str, Any]] | None = None,
        steps: Sequence[Sequence[int]] | None = None,
        position_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_one_of("prediction", prediction, ("velocity", "epsilon"))
        check_one_of("time_direction", time_direction, ("noise_to_data", "data_to_noise"))
        check_one_of("path", path, PATHS)
        check_widths(patch_size=patch_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
        self.patch_size, self.in_channels = patch_size, in_channels
        self.drops_sigma = learn_sigma and prediction == "velocity"
        self.grid = token_grid(sample_size, patch_size)
        self.attention = attention_per_layer(attention, num_layers)
        self.mediators = mediator_set(mediators, self.grid) if "mediator" in self.attention else ()
        self.num_mediators = max(self.mediators, default=0)
        self.gradient_checkpointing = False

        options = AttentionOptions(
            num_heads=num_heads,
            grid=self.grid,
            qk_norm=qk_norm,
            mediators=self.mediators,
            num_agents=num_agents,
            agent_scale_exponent=agent_scale_exponent,
            agent_shortcut=agent_shortcut,
            by_name=options_by_attention(attention_options, self.attention),
        )
        self.steps = steps_of(steps, hidden_size, num_layers, num_heads)
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class)
        self.blocks = nn.ModuleList(
            DiTBlock(
                step.width,
                int(step.width * mlp_ratio + 1e-6),  # a ratio read off two widths must give them back
                self.attention[i],
                replace(options, num_heads=step.num_heads),
                norm_eps,
            )
            for step in self.steps
            for i in step.blocks
        )
        self.step_conditions = projections(self.steps, hidden_size)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        if not 0 < position_scale < math.inf:
            raise ValueError(f"position_scale must be a finite number above 0, got {position_scale}")
        self.register_buffer("pos_embed", self._embedded(self.grid), persistent=False)
        initialize(self)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict at one time step.

        Args:
            x: noisy images or latents [B, c, H, W], H and W multiples of the patch size.
            t: times [B], or one for all, as the checkpoint was trained (see `time_direction`).
            y: class ids [B]. Their range is checked on the CPU; elsewhere that would synchronise the device.
            return_dict: False for a plain tuple.

        Returns:
            `.sample` [B, c, H, W], or [B, 2c, H, W] of an epsilon model that learns sigma.

        Raises:
            ValueError: a size that does not divide into patches, or into too few for the mediators; a class id out of
                range.
        """
        grid = token_grid(x.shape[-2:], self.patch_size)
        dtype = self.x_embedder.proj.weight.dtype  # under autocast the tokens stay in fp32
        tokens = (self.x_embedder(x) + self._positions(grid)).to(dtype)  # [B, N, C]
        t = t.to(x.device, non_blocking=True).expand(len(x))
        condition = self.t_embedder(t, dtype) + self.y_embedder(y)  # [B, C]
        recomputed = self._gradient_checkpointing_func if self.gradient_checkpointing else None

        def run_block(block: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
            inputs = (x, condition, grid, self.num_mediators)
            if recomputed is not None and torch.is_grad_enabled():
                return recomputed(block, *inputs)
            return block(*inputs)

        tokens = run_steps(self.steps, [*self.blocks], self.step_conditions, run_block, tokens, condition)
        sample = unpatchify(self.final_layer(tokens, condition), grid, self.patch_size)
        if self.drops_sigma:
            sample = sample[:, : self.in_channels]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, N, C]"""
        own = self.pos_embed
        assert isinstance(own, Tensor)
        return own if grid == self.grid else self._embedded(grid).to(own)

    def _embedded(self, grid: tuple[int, int]) -> Tensor:
        return position_embedding(grid, self.config["hidden_size"], self.config["position_scale"])

    @property
    def attention_label(self) -> str:
        """The kinds of attention in it, in the order of their first layers: "softmax+inline"."""
        return "+".join(dict.fromkeys(self.attention))

    def set_num_mediators(self, num_mediators: int) -> None:
        """Set n for future calls; a new or loaded model uses its largest.

        Args:
            num_mediators: one of the configured `mediators`, or a perfect square between two of them, for which
                their position biases are blended.

        Raises:
            ValueError: there are no mediator layers, or n is not a perfect square, or out of range.
        """
        check_num_mediators(num_mediators, self.mediators)
        self.num_mediators = num_mediators

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a saved model like diffusers, but require exactly its weights.

        With `output_loading_info=True`, mismatches are returned along with the model instead.

        Raises:
            ValueError: naming the missing and the unexpected weights.
        """
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs | {"output_loading_info": True})
        if not kwargs.get("output_loading_info"):
            loaded, found = loaded
            convert.check_loaded(pretrained_model_name_or_path, found)
        return loaded

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        num_heads: int,
        prediction: str = "velocity",
        num_classes: int | None = None,
        sample_size: int | Sequence[int] | None = None,
        path: str = "linear",
    ) -> Self:
        """A model from the weights of an official DiT or SiT, or of a published mediator checkpoint.

        Args:
            state_dict: the weights by their official names.
            num_heads: not determined by the shapes.
            prediction: "velocity" (SiT, mediators; time from noise to data) or "epsilon" (DiT; from data to noise).
            num_classes: only needed when the label table has no null row.
            sample_size: only needed when the grid is not square and there are no mediators.
            path: "linear" or "gvp"; which interpolant a velocity model was trained on.

        Raises:
            ValueError: naming the missing and the unexpected weights, or the value that does not fit.
        """
        config = convert.official_config(state_dict, num_heads, prediction, num_classes, sample_size)
        return cls(**config, path=path)._load(convert.official_to_native(state_dict))

    def to_official(self, num_mediators: int | None = None) -> dict[str, Tensor]:
        """The weights by their official names, as copies; mediator layers with the biases of one n.

        Args:
            num_mediators: n, as in `set_num_mediators`; None: the current one. Agent layers are written as the
                softmax layers whose weights they have.

        Raises:
            ValueError: attention, steps or a position scale that the official layout has no place for.
        """
        self._check_position_scale("the official layout")
        convert.check_official(self.attention, [kind for kind, x in ATTENTION.items() if x.is_official], self.steps)
        if num_mediators is not None:
            check_num_mediators(num_mediators, self.mediators)
        official = {key: weight for key, weight in self.state_dict().items() if ".attn." not in key}
        official["pos_embed"] = self._positions(self.grid)
        for i, block in enumerate(self.blocks):
            attention: Any = block.attn
            own = attention.official_weights(num_mediators or self.num_mediators)
            official |= {f"blocks.{i}.attn.{name}": weight for name, weight in own.items()}
        return {key: weight.detach().clone() for key, weight in official.items()}

    @classmethod
    def from_diffusers(cls, model: DiTTransformer2DModel, prediction: str = "epsilon", path: str = "linear") -> Self:
        """A model with the weights and outputs of diffusers' DiT, including its time frequencies.

        `prediction` and `path` as in `from_official`.

        Raises:
            TypeError: another class.
            ValueError: a setting this backbone does not have, or copies of the embedders that differ between blocks.
        """
        if not isinstance(model, DiTTransformer2DModel):
            raise TypeError(f"expected a DiTTransformer2DModel, got {type(model).__name__}")
        config = convert_diffusers.config_from_diffusers(model.config, prediction)
        weights = convert_diffusers.diffusers_to_native(model.state_dict(), config["num_layers"])
        return cls(**config, path=path)._load(weights)

    def to_diffusers(self) -> DiTTransformer2DModel:
        """Convert to diffusers' DiT. It returns all channels, and does not record the direction of time.

        Warns:
            UserWarning: unless `frequency_shift` is 1, since diffusers divides the exponent of the time frequencies by
                127 and not 128: at t = 999 they are up to 2.9 radians apart, and outputs differ.

        Raises:
            ValueError: a feature that class does not have, such as mediator layers.
        """
        self._check_position_scale("diffusers' DiT")
        config = convert_diffusers.config_to_diffusers(self.config, self.attention, self.grid, len(self.steps))
        theirs = DiTTransformer2DModel(**config)
        weights = convert_diffusers.native_to_diffusers(self.state_dict(), config["num_layers"])
        theirs.load_state_dict(weights)
        if (shift := self.t_embedder.frequency_shift) != 1:
            warnings.warn(
                f"diffusers' DiT has the time frequencies 10000^(-i/127), this model 10000^(-i/{128 - shift:g}): "
                "outputs will differ, at t = 999 visibly",
                stacklevel=2,
            )
        _cast_like(theirs, self.x_embedder.proj.weight)
        return theirs.eval()

    def _check_position_scale(self, layout: str) -> None:
        if (scale := self.config["position_scale"]) != 1:
            raise ValueError(f"{layout} counts positions in tokens; this model has position_scale={scale:g}")

    def _load(self, weights: Mapping[str, Tensor]) -> Self:
        own = self.state_dict()
        convert.check_names(own, weights)
        convert.check_shapes(own, weights)
        self.load_state_dict(weights)
        _cast_like(self, weights["x_embedder.proj.weight"])
        return self.eval()


def _cast_like(model: nn.Module, weight: Tensor) -> None:
    """Move to the device and dtype of a weight. `ModelMixin.to` would warn about any dtype."""
    nn.Module.to(model, device=weight.device, dtype=weight.dtype)
