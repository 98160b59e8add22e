# The notes' backend.py (note 4), deliberately naive: the yardstick. See README.md.
# Run: GROCERY_DATA_DIR=... uvicorn backend:app   in a folder with the model.pth of run_training.py
import random
from io import BytesIO

import torch
from data_utils import VAL_CSV, GroceryDataset, get_classes, transform
from fastapi import FastAPI, File, HTTPException, UploadFile
from fastapi.responses import StreamingResponse
from model_utils import DEVICE, load_model
from PIL import Image

app = FastAPI()

class_names = get_classes()
model = load_model(num_classes=len(class_names))
model.eval()
val_dataset = GroceryDataset(VAL_CSV, transform=None)


@app.get("/class-names")
def get_class_names():
    return {"classes": list(class_names.values())}


@app.get("/random-image")
def get_random_image():
    image, _ = val_dataset[random.randint(0, len(val_dataset) - 1)]
    buffer = BytesIO()
    image.save(buffer, format="JPEG")
    buffer.seek(0)
    return StreamingResponse(buffer, media_type="image/jpeg")


@app.post("/predict")
async def predict(file: UploadFile = File(...)):
    image_data = await file.read()
    try:
        image = Image.open(BytesIO(image_data)).convert("RGB")
    except Exception:
        raise HTTPException(status_code=400, detail="Invalid image")
    input_tensor = transform(image).unsqueeze(0)
    with torch.no_grad():
        output = model(input_tensor.to(DEVICE))
    _, predicted_idx = torch.max(output, 1)
    predicted_class = class_names[predicted_idx.item()]
    return {"prediction": predicted_class}
