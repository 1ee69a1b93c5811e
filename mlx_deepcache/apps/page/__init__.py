"""The page for people: Gradio on the server's app. Nothing here touches MLX; jobs go to the server's worker."""
