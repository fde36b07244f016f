// Build the page from its data.

{
  const data = JSON.parse(byId("data").textContent);
  const {sets} = data;
  const chooser = byId("set");
  const chosenSet = () => sets[Number(chooser.value)];
  const utterances = new Utterances(data, () => (chosenSet().pooled ? null : Number(chooser.value)));

  const chooseFlag = (flag) => {
    byId("flag").value = flag;
    utterances.restart();
    byId("utterances").scrollIntoView();
  };

  const showSet = () => {
    const set = chosenSet();
    byId("series").replaceChildren(...seriesLegend(set));
    byId("figures").replaceChildren(...figures(set));
    byId("length-ratio").textContent = lengthRatio(set);
    byId("flags").replaceChildren(...flagTable(set, data.flags, chooseFlag));
    byId("wrong").replaceChildren(...wrongLists(set));
    utterances.restart();
  };

  const hours = sets.filter((set) => !set.pooled).reduce((sum, set) => sum + set.hours, 0);
  byId("headline").textContent = `${plural(data.utterances.length, "utterance")}, ${hours.toFixed(2)} h`;
  byId("about").replaceChildren(...aboutList(sets));
  byId("forest").replaceChildren(...forestOf(sets));
  byId("summary").replaceChildren(...summaryTable(sets));
  chooser.append(...sets.map((set, i) => html("option", {value: i}, set.name)));
  chooser.value = sets.length - 1; // all sets
  byId("chooser").hidden = sets.length === 1;
  chooser.addEventListener("change", showSet);
  showSet();
}
