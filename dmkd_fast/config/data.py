"""Settings of images that are read from disk instead of generated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dmkd_fast.config.loading import PathText, Section
from dmkd_fast.runtime.errors import invalid


class RealImagesConfig(Section):
    """The real images of `--data`: idx files, class folders or WebDataset shards."""

    image_size: int | None = Field(None, ge=1, le=8192)
    """Resize to this many pixels, short side first (antialiased), and crop to the center. Image
    files and shards need it. null: as stored."""
    channels: Literal[1, 3] = 3
    """Channels that image files are decoded to. idx files have one."""
    held_out: float | None = Field(None, gt=0, lt=1)
    """Fraction of the training images of each class that is never trained on, chosen by the hashes
    of their names. null: 0.1, and of idx files the last 5,000."""


class SourceConfig(Section):
    """Images in place of a denoiser's: on disk (shards or files), or drawn by a procedure."""

    path: PathText | None = None
    """Directory of the images. Not for priors, which need none."""
    kind: Literal["auto", "shards", "imagefolder", "paper", "priors"] = "auto"
    """Layout. shards: made by `dmkd generate`. imagefolder: class subfolders. paper: files named
    class_X_seed_Y_num_Z.png, as in the sets released with DM-KD. auto: by the content of the
    directory. priors: no directory, but procedural images of shapes and textures, for jobs with
    neither a generator nor data."""
    image_size: int | None = Field(None, ge=1, le=8192)
    """Resize to this many pixels, short side first, and crop to the center. null: as stored. Of
    priors: side of the images; null: views.size."""
    block_images: int = Field(256, ge=1, le=10**6)
    """Images read or drawn together: the ring's block."""
    follow: bool = False
    """Use new shards as they appear, while they are still being made."""
    wait_s: float = Field(3600.0, gt=0, le=1e9)
    """Seconds without a new shard after which a following run stops."""

    @property
    def is_on_disk(self) -> bool:
        """Whether the images are read, and not drawn."""
        return self.kind != "priors"

    @property
    def folder(self) -> str:
        """`path` of images on disk."""
        assert self.path is not None
        return self.path

    @model_validator(mode="after")
    def _path(self) -> SourceConfig:
        if self.is_on_disk and self.path is None:
            raise ValueError(
                "path: missing; add it, or set kind=priors for procedural images, which need none"
            )
        if not self.is_on_disk and self.path is not None:
            fix = "remove one, for example with source.path=null"
            raise invalid("path", "a directory with kind=priors", "none", fix)
        return self

    @model_validator(mode="after")
    def _follow(self) -> SourceConfig:
        if self.follow and self.kind in ("imagefolder", "paper", "priors"):
            got = f"true with kind={self.kind}"
            expected = "kind=shards, as only shards say when they are finished"
            raise invalid("follow", got, expected, "remove one of the two")
        if not self.follow and self.wait_s != 3600:
            raise ValueError("wait_s: got it without follow=true, which it is for; remove it")
        return self
