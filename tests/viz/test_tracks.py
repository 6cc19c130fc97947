"""Tracks keep their colours, and trails show where their centres were."""

import numpy as np

from hf_vlm.viz.sheets import class_color
from hf_vlm.viz.tracks import TrackRenderer


def test_trails_follow_centres_and_end():
    renderer = TrackRenderer(trail_length=5)
    image = np.zeros((400, 400, 3), dtype=np.uint8)
    for frame in range(9):
        x = 40 + 20 * frame
        picture = renderer.render(image, [[x, 200, x + 40, 260]], ["cat"], [7])
    on_the_way = [picture.getpixel((x, 230)) == class_color(7) for x in range(60, 221)]
    assert on_the_way == [x >= 140 for x in range(60, 221)]  # the last five centres are 140, 160, ..., 220
    for _ in range(4):
        picture = renderer.render(image, [], [], [])
    assert renderer.trails[7]
    picture = renderer.render(image, [], [], [])
    assert not renderer.trails
    assert np.asarray(picture).max() == 0
