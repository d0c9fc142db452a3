"""Flask behind gunicorn with sync workers, the default: `gunicorn --workers 2 flask_app:app`."""

from typing import Any

from flask import Flask, request

from benchmarks.peers.classifier import Classifier

app = Flask(__name__)
classifier = Classifier()


@app.post("/predict")
def predict() -> dict[str, Any]:
    return {"predictions": classifier.classify(request.get_data())}
