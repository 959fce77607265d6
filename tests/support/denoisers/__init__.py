"""Tiny real denoisers of diffusers, one case per class; `CASES` runs through the contract suite."""

from support.denoisers.case import Case
from support.denoisers.joint import JOINT
from support.denoisers.pictures import PICTURES
from support.denoisers.unets import UNETS
from support.denoisers.videos import VIDEOS

CASES: tuple[Case, ...] = (*JOINT, *PICTURES, *VIDEOS, *UNETS)
