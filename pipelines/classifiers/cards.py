"""Model cards; the braces are keys of the figures."""

_RECIPE = """## Recipe

{parameters:,} parameters ({weight_bytes:,} bytes, stored in fp16, run in fp32), {mflops:.0f} MFLOP per picture
(multiply-adds twice). Fixed whitening stem, then three stages of 3×3 convolutions with batch norm.
{steps:,} steps of {batch} pictures ({epochs:.1f} epochs), Nesterov SGD (momentum {momentum}), learning rate rising to
{lr} over {warmup_percent} % of the time and falling to 0, weight decay {weight_decay:g}, label smoothing
{label_smoothing}, seed {seed}.{second_descent}
{augmentation}

Hardware: {hardware}. Training took {seconds:.0f} seconds ({pictures_per_second:.0f} pictures per second).
With a budget in minutes the number of steps, and so the weights, depend on the machine.

```
{command}
```
"""

CIFAR = (
    """---
license: other
license_name: cifar-10-research-use
license_link: https://www.cs.toronto.edu/~kriz/cifar.html
pipeline_tag: image-classification
---

# cifar-classifier: features for FID and KID on CIFAR-10, offline

A small residual CNN for 32×32 pictures of the ten CIFAR-10 classes. Its {num_features} pooled features stand in for
Inception's where no weights can be downloaded. Figures made with it compare with each other, never with Inception's,
and mean nothing for other pictures.

```python
import torch

from diffattn.metrics.classifier import Classifier

model = Classifier.from_pretrained("diffattn/assets/cifar-classifier").eval()
pictures = torch.ones(2, 3, 32, 32)  # [B, 3, H, W] in -1..1
features = model.features(pictures)  # [B, {num_features}]
```

## Figures

| what | value |
|---|---|
| accuracy on the {test_pictures:,} test pictures, each seen once as it is | {test_accuracy_percent} % |
| … each seen twice, as it is and mirrored | {test_mirrored_accuracy_percent} % |
| among the five likeliest | {test_top5_percent} % |
| accuracy on {train_pictures:,} of the training pictures | {train_accuracy_percent} % |

`figures.json` holds the same numbers. The exported file was measured, in fp32. The test pictures chose nothing: the
last weights of the run are what is exported.

## Data and licence

CIFAR-10 (Krizhevsky 2009), 50,000 training and 10,000 test pictures as their publisher re-encoded them to JPEG.
CIFAR-10 is offered for research; its pictures are not part of this project. Use the weights accordingly.

"""
    + _RECIPE
)

EMOJI = (
    """---
license: apache-2.0
pipeline_tag: image-classification
---

# emoji-classifier: features for FID and KID on emoji, offline

A small residual CNN that tells Unicode's emoji subgroups ({classes} classes) apart at {input_size}×{input_size} pixels.
Its {num_features} pooled features stand in for Inception's where no weights can be downloaded. Figures made with it
compare with each other, never with Inception's, and mean nothing for other pictures.

```python
import torch

from diffattn.metrics.classifier import Classifier

model = Classifier.from_pretrained("diffattn/assets/emoji-classifier").eval()
pictures = torch.ones(2, 3, 48, 48)  # [B, 3, H, W] in -1..1, on white
features = model.features(pictures)  # [B, {num_features}]
```

## Figures

| what | value |
|---|---|
| accuracy on {held_out_pictures} held-out pictures of {held_out_classes} classes | {held_out_accuracy_percent} % |
| … each seen twice, as it is and mirrored | {held_out_mirrored_accuracy_percent} % |
| among the five likeliest | {held_out_top5_percent} % |
| always answering the commonest class of the training pictures | {commonest_percent} % |
| accuracy on the {train_pictures:,} training pictures, unchanged | {train_accuracy_percent} % |

Held out is every {held_out_every}th picture of every class, fixed beforehand. Classes with fewer are only trained on:
the held-out figure says nothing about them. There are few pictures per class, and the classes are Unicode's, not a
painter's ("person-role" and "person-activity" look alike). `figures.json` holds the same numbers. The exported file
was measured, in fp32.

## Data and licence

1,609 Noto Emoji pictures (the image resources of googlefonts/noto-emoji, Apache-2.0), on white; the classes are the
subgroups of Unicode's `emoji-test.txt`. The weights are Apache-2.0.

"""
    + _RECIPE
)
