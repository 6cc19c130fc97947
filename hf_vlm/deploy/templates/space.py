"""A page on which images are dropped and predictions seen: the app of a Space."""

from pathlib import Path

from hf_vlm.deploy.app import build_app
from hf_vlm.deploy.predict import Predictor

here = Path(__file__).parent
predictor = Predictor.from_pretrained(here / "model")
app = build_app(predictor, sorted(map(str, here.glob("examples/*"))), name="{{ name }}")

if __name__ == "__main__":
    app.launch()
