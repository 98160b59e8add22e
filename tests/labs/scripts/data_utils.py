from grocery_nb.data_utils import *
