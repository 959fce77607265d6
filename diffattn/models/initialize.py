"""Initial weights of a new backbone."""

from torch import nn


def initialize(model: nn.Module) -> None:
    """Initialise as adaLN-Zero: every block starts as the identity, and the output as zero.

    Attention parameters other than linear layers keep the values set in their own file."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch = model.get_submodule("x_embedder.proj")
    assert isinstance(patch, nn.Conv2d)
    nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
    nn.init.zeros_(patch.bias)  # type: ignore[arg-type]
    nn.init.normal_(model.get_parameter("y_embedder.embedding_table.weight"), std=0.02)
    for module in model.get_submodule("t_embedder.mlp").children():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    gates = [module for name, module in model.named_modules() if name.endswith("adaLN_modulation.1")]
    for module in (*gates, model.get_submodule("final_layer.linear")):
        for weight in module.parameters():
            nn.init.zeros_(weight)
