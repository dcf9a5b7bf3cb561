"""This project inside other trainers."""
