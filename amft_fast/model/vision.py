"""Pictures for vision-language policies: how many tokens one takes in a prompt, and what a model's forward needs for them.

Two families of transformers models are known. "mrope" (Qwen2-VL, Qwen2.5-VL, Qwen3-VL): every image stands in the prompt as a
run of placeholder tokens, as many as its patches give, and positions have three axes (time, height, width). "cross"
(Llama-3.2-Vision): one token an image, which later tokens attend to through cross-attention layers.

Pictures travel as PIL images (or paths) with requests, samples and sequences; pixels are made here, once for each image, and
only when a forward pass needs them. Images are read by transformers' PIL processors, without torchvision.

Legend: B rows, L columns, P patches.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from amft_fast.config import ModelConfig
from amft_fast.errors import UserError
from amft_fast.model.base import read_config, unloadable

FAMILIES = {
    "qwen2_vl": "mrope",
    "qwen2_5_vl": "mrope",
    "qwen3_vl": "mrope",
    "qwen3_vl_moe": "mrope",
    "mllama": "cross",
}
# Inside the backbone: the vision tower, and what carries its output into the language model.
TOWER = {"mrope": "visual", "cross": "vision_model"}
PROJECTORS = {"mrope": ("visual.merger", "visual.deepstack_merger_list"), "cross": ("multi_modal_projector",)}
CACHE_BYTES = 512 * 2**20

Row = tuple[np.ndarray, tuple[Any, ...]]  # token ids, and the images in their order


class Vision:
    """The pictures' way into one model. `processor` is its image processor, `config` its configuration.

    `stop_token_ids` end an answer beside the tokenizer's: an image token that the policy itself wrote stands for no image.
    """

    def __init__(self, processor: Any, config: Any, substitute: int = 0) -> None:
        self.processor, self.config = processor, config
        self.family = FAMILIES[config.model_type]
        self.image_token = config.image_token_id if self.family == "mrope" else config.image_token_index
        self.stop_token_ids = (self.image_token,) if self.family == "mrope" else ()
        self.substitute = substitute  # read in place of an image token that stands for no image
        self._pixels: OrderedDict[int, tuple[Any, dict[str, np.ndarray]]] = OrderedDict()
        self._held = 0
        self._blank: Any = None

    # ------------------------------------------------------------------------------------------------- in the prompt

    def tokens(self, image: Any) -> int:
        """How many tokens an image takes."""
        if self.family == "cross":
            return 1
        return int(self.pixels(image)["image_grid_thw"].prod()) // self._merge**2

    def expand(self, ids: list[int], images: Sequence[Any]) -> list[int]:
        """Token ids as the chat template gives them, with every image's token repeated as often as the image needs.

        Raises UserError when the template did not make one place for each image.
        """
        places = ids.count(self.image_token)
        if places != len(images):
            raise UserError(
                f"model.path: the chat template made {places} places for {len(images)} images: it must write the image "
                "token once for each content of type image"
            )
        left = iter(images)
        return [x for i in ids for x in ([i] * self.tokens(next(left)) if i == self.image_token else [i])]

    def readable(self, token: torch.Tensor) -> torch.Tensor:
        """Tokens that the policy wrote, as it is to read them: an image token among them stands for no image."""
        return token.masked_fill(token == self.image_token, self.substitute) if self.family == "mrope" else token

    def kin(self, counts: Sequence[int], packed: bool = False) -> list[list[int]]:
        """The rows that may share a forward pass, by their numbers of images. With cross-attention these must be alike: in
        transformers, text before the first image attends to all that the batch has room for (Mllama's masked-out rows).

        For the same reason an image that comes late changes the states of such text: log-probs of several turns with an
        image each are exact for "mrope" alone. Raises UserError where rows with cross-attention are `packed`.
        """
        if self.family == "mrope":
            return [list(range(len(counts)))]
        if packed:
            raise UserError("train.packing: models with cross-attention to images cannot pack; set it to false")
        return [[i for i, c in enumerate(counts) if c == count] for count in sorted(set(counts))]

    # ------------------------------------------------------------------------------------------------------- pixels

    def pixels(self, image: Any) -> dict[str, np.ndarray]:
        """What the image processor makes of one image; kept while there is room. Callers must not change it."""
        key = id(image)  # the entry holds the image, so its id is not given anew
        if key in self._pixels:
            self._pixels.move_to_end(key)
            return self._pixels[key][1]
        made = self._process(image)
        self._pixels[key] = image, made
        self._held += _size(made)
        while self._held > CACHE_BYTES and len(self._pixels) > 1:
            self._held -= _size(self._pixels.popitem(last=False)[1][1])
        return made

    def _process(self, image: Any) -> dict[str, np.ndarray]:
        picture = opened(image)
        nested = [picture] if self.family == "mrope" else [[picture]]
        return {k: np.asarray(v) for k, v in self.processor(images=nested, return_tensors="np").items()}

    # ------------------------------------------------------------------------------------------------ for the forward

    def inputs(
        self, rows: Sequence[Row], device: torch.device, packed: bool = False, left: bool = False, pad: int = 0
    ) -> dict[str, Any]:
        """What a forward needs for these rows, to be made arguments of; {} where no row has an image.

        `input_ids` [B, L] and `position_ids` ([3, B, L]; [4, 1, L] packed, text positions first), with the pixels of all
        different images, and `which` of them stand in the rows, where one does several times, with their `sizes` in patches.
        Rows are padded on the right, on the `left`, or `packed` into one.
        """
        if not any(images for _, images in rows):
            return {}
        made = self._cross(rows, left, pad) if self.family == "cross" else self._mrope(rows, packed, left, pad)
        return {k: v if isinstance(v, list) else _to(torch.from_numpy(v), device) for k, v in made.items()}

    def arguments(self, backbone: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` as the arguments of a forward. An image that several rows show goes through the tower once: a group of
        answers costs one look at its prompt's picture. The tower comes before the text, as in `spare_look`."""
        which, sizes = inputs.pop("which", None), inputs.pop("sizes", None)
        if self.family == "cross" or "pixel_values" not in inputs:
            return inputs
        if not _takes_features(backbone):
            return inputs if which is None else inputs | _repeated(inputs, which, sizes)
        seen = backbone.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grid_thw"), return_dict=True)
        if which is not None:
            seen.pooler_output = [seen.pooler_output[i] for i in which]
            if getattr(seen, "deepstack_features", None) is not None:
                seen.deepstack_features = [[layer[i] for i in which] for layer in seen.deepstack_features]
        return inputs | {"mm_encoder_outputs": {"image": seen}}

    # ---------------------------------------------------------------------------------- ranks that wait for each other

    def spare_row(self) -> Row:
        """A row with a blank picture that nothing is read of."""
        from PIL import Image

        self._blank = self._blank or Image.new("RGB", (16, 16))
        return np.array([self.image_token, self.substitute]), (self._blank,)

    def spare_look(self, backbone: nn.Module, device: torch.device) -> torch.Tensor:
        """0, with a way back through all of the tower, which has looked at a blank picture ("mrope")."""
        _, (blank,) = self.spare_row()
        made = {k: _to(torch.from_numpy(v), device) for k, v in self.pixels(blank).items()}
        seen = backbone.get_image_features(made["pixel_values"], made["image_grid_thw"], return_dict=True)
        layers = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())]
        return sum(nothing_of(one) for layer in layers for one in layer)

    def binds(self, backbone: nn.Module, cut: bool) -> bool:
        """Whether ranks must take the same way through the model: where a pass gathers parameters, or trains some that only
        pictures reach."""
        eyes = backbone.get_submodule(TOWER[self.family])
        return cut or self.family == "cross" or any(p.requires_grad for p in eyes.parameters())

    def unshared(self, backbone: nn.Module) -> str:
        """Why ranks cannot look at pictures together, each at its own; "" if they can."""
        if self.family == "cross" or _takes_features(backbone):
            return ""
        import transformers

        return f"transformers {transformers.__version__} has no mm_encoder_outputs, by which a tower is passed before the text"

    @property
    def _merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    def _mrope(self, rows: Sequence[Row], packed: bool, left: bool, pad: int) -> dict[str, Any]:
        read, positions, pixels, which = [], [], {}, []
        for ids, images in rows:
            made = [self.pixels(image) for image in images]
            pixels |= {id(image): m for image, m in zip(images, made)}
            which += map(id, images)
            grids = [tuple(int(n) for n in m["image_grid_thw"][0]) for m in made]
            starts = self.places(ids, grids)
            read.append(self._without_strays(ids, starts, grids))
            positions.append(mrope_positions(len(ids), starts, grids, self._merge))
        if packed:
            text = np.concatenate([np.arange(len(ids)) for ids in read])
            joined = np.concatenate([text[None], np.concatenate(positions, 1)])
            out = {"input_ids": np.concatenate(read)[None], "position_ids": joined[:, None]}
        else:
            out = {
                "input_ids": _pad_rows(read, left, pad),
                "position_ids": _pad_rows(positions, left, 0).swapaxes(0, 1),
            }
        for name in ("pixel_values", "image_grid_thw"):
            out[name] = np.concatenate([m[name] for m in pixels.values()])
        if len(pixels) < len(which):
            places = {image: i for i, image in enumerate(pixels)}
            out["which"] = [places[image] for image in which]
            out["sizes"] = [len(m["pixel_values"]) for m in pixels.values()]
        return out

    def places(self, ids: np.ndarray, grids: Sequence[tuple[int, int, int]]) -> list[int]:
        """Where each image's run of placeholder tokens begins in `ids`. Raises ValueError if there is none for one."""
        opened = np.flatnonzero((ids[1:] == self.image_token) & (ids[:-1] == self.config.vision_start_token_id)) + 1
        starts, at = [], 0
        for t, h, w in grids:
            n = t * h * w // self._merge**2
            fits = [s for s in opened[opened >= at] if (ids[s : s + n] == self.image_token).all() and s + n <= len(ids)]
            if not fits:
                raise ValueError(
                    f"ids must hold a run of {n} image tokens for each image, got {len(starts)} of {len(grids)}"
                )
            starts.append(int(fits[0]))
            at = starts[-1] + n
        return starts

    def _without_strays(self, ids: np.ndarray, starts: list[int], grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
        stray = ids == self.image_token
        for start, (t, h, w) in zip(starts, grids):
            stray[start : start + t * h * w // self._merge**2] = False
        return np.where(stray, self.substitute, ids)

    def _cross(self, rows: Sequence[Row], left: bool, pad: int) -> dict[str, np.ndarray]:
        from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

        made = [[self.pixels(image) for image in images] for _, images in rows]
        most, width = max(map(len, made)), max(len(ids) for ids, _ in rows)
        example = next(m for row in made for m in row)
        tiles = example["aspect_ratio_mask"].shape[-1]
        attend = np.zeros((len(rows), width, most, tiles), np.int64)
        out = {k: np.zeros((len(rows), most, *example[k].shape[2:]), example[k].dtype) for k in _CROSS_INPUTS}
        out["aspect_ratio_mask"][..., 0] = 1  # of a missing image too, as the model's own processor has it
        for row, ((ids, _), images) in enumerate(zip(rows, made)):
            shift = width - len(ids) if left else 0
            for i, m in enumerate(images):
                for name in _CROSS_INPUTS:
                    out[name][row, i] = m[name][0, 0]
            spans = get_cross_attention_token_mask(ids.tolist(), self.image_token) if images else []
            for i, (start, end) in enumerate(spans):
                end = len(ids) if end == -1 else end
                attend[row, shift + start : shift + end, i, : int(images[i]["num_tiles"][0][0])] = 1
        return out | {"input_ids": _pad_rows([ids for ids, _ in rows], left, pad), "cross_attention_mask": attend}

    @staticmethod
    def after_prefill(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What every further token of a row is given, [B, 1, ...]: it attends to the images that the prompt's last did."""
        return {k: v[:, -1:] for k, v in inputs.items() if k == "cross_attention_mask"}


_CROSS_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def mrope_positions(
    length: int, starts: Sequence[int], grids: Sequence[tuple[int, int, int]], merge: int
) -> np.ndarray:
    """Positions [3, length] on the axes time, height and width: text counts on along all three; an image's tokens lie on
    its grid (t, h, w in patches, `merge` of them to a token's side), and text goes on behind the grid's longer side."""
    out, at, position = np.empty((3, length), np.int64), 0, 0
    for start, (t, h, w) in zip(starts, grids):
        h, w = h // merge, w // merge
        out[:, at:start] = position + np.arange(start - at)
        position += start - at
        at = start + t * h * w
        out[:, start:at] = position + np.stack(np.unravel_index(np.arange(t * h * w), (t, h, w)))
        position += max(h, w)
    out[:, at:] = position + np.arange(length - at)
    return out


def _repeated(inputs: dict[str, Any], which: list[int], sizes: list[int]) -> dict[str, torch.Tensor]:
    """Pixels and grids as often as they are shown."""
    patches, grids = inputs["pixel_values"].split(sizes), inputs["image_grid_thw"]
    return {
        "pixel_values": torch.cat([patches[i] for i in which]),
        "image_grid_thw": torch.stack([grids[i] for i in which]),
    }


def opened(image: Any) -> Any:
    """A picture, or the one at this path, as PIL has it in RGB. Raises UserError where it cannot be read."""
    from PIL import Image

    try:
        picture = image if hasattr(image, "convert") else Image.open(image)
        return picture.convert("RGB")
    except (OSError, AttributeError, ValueError) as e:
        raise UserError(f"the image {image!r} cannot be read: {e}") from None


def nothing_of(tensor: torch.Tensor) -> torch.Tensor:
    """0, whatever `tensor` holds, with a gradient of zeros for it."""
    return tensor.flatten()[:0].sum()


def _takes_features(backbone: nn.Module) -> bool:
    return "mm_encoder_outputs" in inspect.signature(backbone.forward).parameters  # transformers before 5.2x: no


def _pad_rows(rows: Sequence[np.ndarray], left: bool, fill: int) -> np.ndarray:
    """Rows [..., T] of different length as one [B, ..., L]."""
    width = max(r.shape[-1] for r in rows)
    out = np.full((len(rows), *rows[0].shape[:-1], width), fill, np.int64)
    for i, r in enumerate(rows):
        start = width - r.shape[-1] if left else 0
        out[i, ..., start : start + r.shape[-1]] = r
    return out


def _size(arrays: dict[str, np.ndarray]) -> int:
    return sum(a.nbytes for a in arrays.values())


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------- loading


def load_vision(cfg: ModelConfig, substitute: int = 0) -> Vision | None:
    """The pictures' way into the checkpoint `cfg.path`; None for a model without eyes.

    Raises UserError when the checkpoint has no image processor. `substitute`: see `Vision`.
    """
    from transformers import AutoImageProcessor

    config = read_config(cfg)
    if config.model_type not in FAMILIES:
        return None
    try:
        processor = AutoImageProcessor.from_pretrained(cfg.path, trust_remote_code=False, **_backend())
    except Exception as e:  # as load_tokenizer
        raise unloadable(cfg.path, "the image processor of", e) from None
    if cfg.max_pixels is not None and FAMILIES[config.model_type] == "mrope":
        processor.size = {**dict(processor.size), "longest_edge": cfg.max_pixels}
    return Vision(processor, config, substitute)


def _backend() -> dict[str, str]:
    """transformers takes the torchvision processors by default and says so where they are missing: PIL's then."""
    from transformers.utils import is_torchvision_available

    return {} if is_torchvision_available() else {"backend": "pil"}


def is_vision_language(model_type: str) -> bool:
    return model_type in FAMILIES


def freeze(model: nn.Module, what: str) -> None:
    """Takes the vision tower (what = "projector") or the tower and its projector ("frozen") out of the training."""
    family = FAMILIES.get(model.config.model_type)
    if family is None or what == "trained":
        return
    backbone = getattr(model, model.base_model_prefix)
    backbone.get_submodule(TOWER[family]).requires_grad_(False)
    for name in PROJECTORS[family]:
        owner, _, last = name.rpartition(".")
        if hasattr(backbone.get_submodule(owner), last):
            backbone.get_submodule(name).requires_grad_(what == "projector")
