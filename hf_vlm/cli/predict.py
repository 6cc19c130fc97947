"""`hf-vlm predict RUN photo.jpg --save out.png`"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def run(words: Sequence[str]) -> None:
    """Finds objects in images; prints JSON lines, and draws what was found where asked to."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm predict", description="Finds objects in images; prints one line of JSON an image."
    )
    parser.add_argument("run", help="folder of a detector, or its name on the Hub")
    parser.add_argument("images", nargs="+", help="image files, folders or wildcards")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score that counts, 0 to 1")
    parser.add_argument("--save", type=Path, help="picture to write; a folder where there are several images")
    arguments = parser.parse_args(words)

    from hf_vlm.deploy.predict import Predictor
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    predictions = Predictor.from_pretrained(arguments.run).predict(arguments.images, arguments.threshold)
    for prediction in predictions:
        print(json.dumps(prediction.to_dict()))
    if arguments.save is None:
        return
    as_folder = len(predictions) > 1 or not arguments.save.suffix
    for prediction in predictions:
        assert prediction.path is not None  # they were given as paths
        path = arguments.save / f"{Path(prediction.path).stem}.png" if as_folder else arguments.save
        path.parent.mkdir(parents=True, exist_ok=True)
        prediction.draw().save(path)
