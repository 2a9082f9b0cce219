"""What the Python drivers share: try each case, and write down what came of it."""

import json
import sys
from pathlib import Path


def answer_all(cases):
    """Call ``cases(job)``, a dictionary of calls, and each of them; write the answers as JSON."""
    given, answer = map(Path, sys.argv[1:3])
    answers = {name: attempt(call) for name, call in cases(json.loads(given.read_text())).items()}
    answer.write_text(json.dumps(answers))


def attempt(call):
    try:
        return {"value": call()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
