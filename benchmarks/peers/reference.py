"""Print the top class of every labelled image by eager torch in fp32, as a JSON object."""

import json
import sys
from pathlib import Path

from benchmarks.images import load_rgb, read_labels
from benchmarks.peers.classifier import Classifier

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    labels = read_labels(folder)
    classifier = Classifier("eager")
    pictures = [picture for picture in load_rgb(folder) if picture.name in labels]
    print(json.dumps({p.name: classifier.classify(p.body)[0]["class"] for p in pictures}))
