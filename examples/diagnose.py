"""Diagnose one answer: the image region behind each object, its verdict, and an HTML page to share.

python examples/diagnose.py
"""

from pathlib import Path

import stethoscope
from stethoscope import testbed

adapter = stethoscope.load("testbed")
image = testbed.scenes(2)[1].image()  # or the path of a file
diagnosis = stethoscope.diagnose(adapter, image, "Please describe this image in detail.", detector=testbed.DETECTOR_DIR)

print(diagnosis.answer.text)
for mention in diagnosis.mentions:
    first = mention.tokens[0]
    (left, top, right, bottom), share = diagnosis.regions(first, count=1)[0]
    verdict = "warned" if mention.warned else "fine"
    print(
        f"{mention.object:<14} {mention.probability:4.0%} {verdict:<7} most relevant region: "
        f"x {left:.0f}-{right:.0f}, y {top:.0f}-{bottom:.0f} ({share:.0%} of the picture's relevancy)"
    )

print(diagnosis.to_frame().head())  # one row for every token
Path("runs").mkdir(exist_ok=True)
Path("runs/example-diagnosis.html").write_text(diagnosis.to_html(), encoding="utf-8")  # needs no network
diagnosis.picture(diagnosis.mentions[0].tokens[0]).save("runs/example-heat-map.png")
