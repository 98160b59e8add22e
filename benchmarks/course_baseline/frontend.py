# The notes' frontend.py (note 2, exercise 05), deliberately naive. See README.md.
# The notes describe the functions; the layout around them is the least that shows their result.
import base64

import requests
from dash import Dash, Input, Output, dcc, html

API_URL = "http://localhost:8000"

app = Dash(__name__)
app.layout = html.Div([
    html.Button("Random image", id="button", n_clicks=0),
    html.Img(id="image"),
    dcc.Markdown(id="prediction"),
])


def get_random_image():
    response = requests.get(f"{API_URL}/random-image")
    return response.content


def predict_image(image_bytes):
    files = {"file": ("image.jpg", image_bytes, "image/jpeg")}
    response = requests.post(f"{API_URL}/predict", files=files)
    return response.json()["prediction"]


@app.callback(
    Output("image", "src"),
    Output("prediction", "children"),
    Input("button", "n_clicks"),
    prevent_initial_call=True,
)
def update_output(n_clicks):
    image_bytes = get_random_image()
    prediction = predict_image(image_bytes)
    encoded = base64.b64encode(image_bytes).decode()
    return f"data:image/jpeg;base64,{encoded}", f"Prediction: {prediction}"


if __name__ == "__main__":
    app.run()
