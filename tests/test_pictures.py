"""Pictures of episodes: from a task's hook through samples.jsonl into report.html."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from amft_fast.config import VirlConfig
from amft_fast.data.pictures import MAX_CHARS, data_uri, shown_picture
from amft_fast.interfaces import Sample
from amft_fast.report.page import write_report
from amft_fast.tasks.virl.task import Virl


def test_images_and_svg_come_back_from_their_uris():
    image = Image.new("RGB", (5, 4), (1, 2, 3))
    kind, _, data = data_uri(image).partition(";base64,")
    assert kind == "data:image/png" and Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 3)) == (1, 2, 3)
    kind, _, data = data_uri("<svg>↑</svg>").partition(";base64,")
    assert kind == "data:image/svg+xml" and base64.b64decode(data).decode() == "<svg>↑</svg>"
    assert shown_picture(data_uri(image)) == data_uri(image)


@pytest.mark.parametrize("picture", [b"png", 7, None, "x" * MAX_CHARS])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match="picture must"):
        data_uri(picture)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "http://example.org/a.png",
        "data:text/html;base64,AAAA",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "data:image/png;base64,AAAA\n",
        "javascript:alert(1)",
        "data:image/png;base64," + "A" * MAX_CHARS,
    ],
)
def test_what_is_no_data_uri_of_a_picture_is_not_shown(value):
    assert shown_picture(value) == ""


def test_the_report_shows_the_map_of_an_episode(tmp_path):
    task = Virl(VirlConfig(num_train=3, num_val=3, num_test=3, cities=1))
    item = task.prompts("train")[0]
    sample = Sample([], [], [], [], 0, "stop", item.id, 0, info={"trace": ((0, "correct", "north"),)})
    uri = data_uri(task.picture(item, sample))
    row = {"step": 0, "prompt": "p", "completion": "c", "reward": 1.0, "success": True}
    rows = [row | {"picture": uri}, row | {"picture": "javascript:alert(1)"}, row]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "mu": 0.5}) + "\n")
    page = write_report(tmp_path).read_text()
    assert re.findall(r'<img src="([^"]*)"', page) == [uri]
    assert "img-src data:" in page and "javascript" not in page
