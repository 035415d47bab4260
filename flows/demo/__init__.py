"""The demo: real flights, real models of whether they arrive late, and what each model was made wrong."""
