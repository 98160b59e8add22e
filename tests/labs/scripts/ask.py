"What the labs' front end asks of the backend: the class names, a picture, its prediction."
import sys

import requests

API_URL = sys.argv[1]
classes = requests.get(f"{API_URL}/class-names", timeout=10).json()["classes"]
picture = requests.get(f"{API_URL}/random-image", timeout=10)
answer = requests.post(f"{API_URL}/predict", files={"file": picture.content}, timeout=10).json()
refused = requests.post(f"{API_URL}/predict", files={"file": b"no picture"}, timeout=10)
print(picture.headers["content-type"], answer["prediction"] in classes, refused.status_code)
