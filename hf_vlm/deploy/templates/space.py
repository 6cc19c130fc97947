"""A page on which images are dropped and predictions seen: the app of a Space."""

from pathlib import Path

from hf_vlm.deploy.app import build_app
from hf_vlm.deploy.predict import Predictor

here = Path(__file__).parent
predictor = Predictor.from_pretrained(here / "model")
examples = sorted(map(str, here.glob("examples/*")))
app = build_app(predictor, examples, name="{{ name }}", threshold=predictor.score_threshold)

if __name__ == "__main__":
    app.launch()
