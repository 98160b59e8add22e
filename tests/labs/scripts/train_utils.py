from grocery_nb.train_utils import *
