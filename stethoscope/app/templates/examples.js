// Example pictures to choose from; the server puts the chosen one into the picture's own field.
const holder = element.querySelector('[data-id="examples"]');

holder.replaceChildren(...JSON.parse(props.value).map((example, index) => {
  const button = document.createElement("button"), image = document.createElement("img");
  button.type = "button";
  button.className = "st-example";
  image.src = example.picture;
  image.alt = example.name;
  button.append(image);
  button.addEventListener("click", () => trigger("pick", { index }));
  return button;
}));
element.querySelector('[data-id="label"]').hidden = !holder.children.length;
