from grocery_nb.model_utils import *
