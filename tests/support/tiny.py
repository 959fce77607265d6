"""Tiny real diffusers pipelines with random weights, created in a moment."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from diffattn.sampling import SiTPipeline
from support import sampling_cases, tiny_transformers

SIZE = 32  # pixels; the VAE halves once, so latents are 16x16 and level 0 has 256 tokens
WIDTH = 32  # of the text encoder


def unet(sdxl: bool = False, in_channels: int = 4, **overrides: Any) -> UNet2DConditionModel:
    """SD 1.x: attention at levels 0, 1 and in the middle. SDXL: levels 1 and 2, none at level 0."""
    torch.manual_seed(0)
    config: dict[str, Any] = dict(
        sample_size=SIZE // 2,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    )
    if sdxl:
        config |= dict(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )
    return UNet2DConditionModel(**(config | overrides)).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    ).eval()


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=512,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Bytes only: every character of a prompt is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]
    vocab = {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)])}
    vocab = {t: i for t, i in vocab.items() if i < 512}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip(folder: Path) -> Path:
    """A CLIP model with its processor in a folder: pictures of 16 pixels a side, embeddings of 12."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = text_config().to_dict() | {"projection_dim": 12}
    vision = sizes | {"patch_size": 4, "image_size": 16, "projection_dim": 12}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.visual_projection.weight.data.neg_()  # so that random pictures and texts agree
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return folder


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def controlnet() -> ControlNetModel:
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(8, 8)).eval()
    for parameter in net.parameters():  # the zero convolutions would hide the whole net
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def pipeline(kind: str, folder: Path) -> DiffusionPipeline:
    """A pipeline of one kind.

    Args:
        kind: sd, sdxl, img2img, inpaint, controlnet, dit, pixart, pixart-sigma, sit or sit-mediators.
        folder: for the tokenizer's files.
    """
    pipe = _with_transformer(kind) if kind.startswith(("dit", "pixart", "sit")) else _with_unet(kind, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _with_transformer(kind: str) -> DiffusionPipeline:
    if kind.startswith("sit"):
        attention = "mediator" if kind == "sit-mediators" else "softmax"
        return sampling_cases.tiny_pipeline(attention=attention, in_channels=3)
    if kind == "dit":
        return tiny_transformers.dit_pipeline(vae())
    return tiny_transformers.pixart_pipeline(vae(), sigma=kind == "pixart-sigma")


def _with_unet(kind: str, folder: Path) -> DiffusionPipeline:
    torch.manual_seed(0)
    parts: dict[str, Any] = dict(vae=vae(), tokenizer=tokenizer(folder), scheduler=scheduler())
    if kind == "sdxl":
        text_2 = CLIPTextModelWithProjection(text_config()).eval()
        return StableDiffusionXLPipeline(
            **parts,
            unet=unet(sdxl=True),
            text_encoder=CLIPTextModel(text_config()).eval(),
            text_encoder_2=text_2,
            tokenizer_2=parts["tokenizer"],
            add_watermarker=False,
        )
    parts |= dict(
        text_encoder=CLIPTextModel(text_config()).eval(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if kind == "controlnet":
        return StableDiffusionControlNetPipeline(**parts, unet=unet(), controlnet=controlnet())
    classes = {
        "sd": StableDiffusionPipeline,
        "img2img": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline,
    }
    return classes[kind](**parts, unet=unet(in_channels=9 if kind == "inpaint" else 4))


def picture(seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def run(pipe: DiffusionPipeline, seed: int = 0, prompt: Any = "a cat", **overrides: Any) -> torch.Tensor:
    """Images of a short run [B, H, W, 3] in 0..1; a DiT draws class 7, a SiT class 3."""
    arguments: dict[str, Any] = dict(prompt=prompt, num_inference_steps=4, guidance_scale=3.0, output_type="np")
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        arguments |= dict(image=picture(), strength=0.9)
    elif isinstance(pipe, StableDiffusionInpaintPipeline):
        arguments |= dict(image=picture(), mask_image=Image.new("L", (SIZE, SIZE), 255), height=SIZE, width=SIZE)
    elif isinstance(pipe, StableDiffusionControlNetPipeline):
        arguments |= dict(image=picture(), height=SIZE, width=SIZE)
    elif isinstance(pipe, DiTPipeline | SiTPipeline):
        label = 7 if isinstance(pipe, DiTPipeline) else 3
        arguments = dict(class_labels=[label]) | {k: v for k, v in arguments.items() if k != "prompt"}
    elif isinstance(pipe, PixArtAlphaPipeline | PixArtSigmaPipeline):
        arguments |= dict(height=SIZE, width=SIZE, use_resolution_binning=False, clean_caption=False)
    else:
        arguments |= dict(height=SIZE, width=SIZE)
    arguments |= dict(generator=torch.Generator().manual_seed(seed)) | overrides
    draw: Any = pipe
    return torch.from_numpy(draw(**arguments).images)
