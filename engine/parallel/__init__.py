"""How one model is split over ranks: who owns what, and the few ways in which ranks talk."""
